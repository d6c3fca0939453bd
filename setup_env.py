"""Set vfmseg up in a `.venv` of its own beside this file and run it; needs Python >= 3.10 and nothing else.

    python3 setup_env.py demo [options of `vfmseg demo`]   installs vfmseg, then runs the demo
    python3 setup_env.py test [options of pytest]          installs vfmseg with its tools, then runs every check

The first run downloads what `pyproject.toml` asks for; later runs install only if that file has changed.
Packages go to `.venv` only, so an externally managed Python is as good as any other. pip's own settings (index,
proxy, certificates) hold.
"""

# No `from __future__ import annotations`, and quoted annotations: an older Python (3.6) has to get as far as the
# line that says it is too old.
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

MINIMUM = (3, 10)
MACHINE = 3  # exit code: the machine could not do it, as for the commands of vfmseg
EXTRAS = {"demo": "", "test": "test"}
STAMP = "vfmseg-setup.json"
# Settings of the person who calls that would send packages elsewhere, or bring foreign ones in.
MISLEADING = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class SetupError(Exception):
    """This machine cannot be set up; the message says what is missing and how to get it."""


def too_old(version: "tuple[int, ...]", newer: "str | None" = None) -> "str | None":
    """The line to show if this Python version is below MINIMUM, naming a newer one found on the machine."""
    if tuple(version[:2]) >= MINIMUM:
        return None
    need = ".".join(str(part) for part in MINIMUM)
    found = ".".join(str(part) for part in version[:3])
    remedy = f"try: {newer} setup_env.py" if newer else f"install Python {need} or newer and use that"
    return f"setup_env.py: this is Python {found}, vfmseg needs {need} or newer; {remedy}"


def newer_python() -> "str | None":
    """The name of a Python on the search path that is new enough, newest first."""
    names = [f"python3.{minor}" for minor in range(14, MINIMUM[1] - 1, -1)]
    return next((name for name in names if answers([name, "-c", ""])), None)


def tool(venv: Path, name: str, windows: "bool | None" = None) -> Path:
    """Where a virtual environment keeps a program."""
    windows = os.name == "nt" if windows is None else windows
    return venv / "Scripts" / f"{name}.exe" if windows else venv / "bin" / name


def clean_environment(environment: "dict[str, str]") -> "dict[str, str]":
    """The environment for child processes: packages can go to, and come from, `.venv` only."""
    kept = {name: value for name, value in environment.items() if name.upper() not in MISLEADING}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1"}


def run(command: "list[str]", folder: Path) -> int:
    """Print a command, run it in a folder and return its exit code (128 + signal if it was killed)."""
    print(f"$ {subprocess.list2cmdline(command)}", flush=True)
    code = subprocess.call(command, cwd=str(folder), env=clean_environment(dict(os.environ)))
    return 128 - code if code < 0 else code


def answers(command: "list[str]") -> bool:
    """Whether a command can be started and ends well; its output is dropped."""
    try:
        environment, null = clean_environment(dict(os.environ)), subprocess.DEVNULL
        return subprocess.call(command, env=environment, stdin=null, stdout=null, stderr=null) == 0
    except OSError:
        return False


def usable(venv: Path) -> bool:
    """Whether a virtual environment is there, starts, and has a Python that is new enough."""
    python = tool(venv, "python")
    check = f"import sys; sys.exit(sys.version_info[:2] < {MINIMUM} or sys.prefix == sys.base_prefix)"
    return python.exists() and answers([str(python), "-c", check])


def ways_to_create(venv: Path) -> "list[list[str]]":
    """Commands that make a virtual environment on this machine, best first."""
    ways = []
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        ways.append([sys.executable, "-m", "venv", str(venv)])
    if importlib.util.find_spec("virtualenv"):
        ways.append([sys.executable, "-m", "virtualenv", str(venv)])
    for program, verb in (("virtualenv", ["--python"]), ("uv", ["venv", "--python"])):
        found = shutil.which(program)
        if found:
            ways.append([found, *verb, sys.executable, str(venv)])
    if importlib.util.find_spec("venv") and host_pip():
        ways.append([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    return ways


def host_pip() -> bool:
    """Whether the Python that runs this file has a pip that installs into another one (22.3 or newer)."""
    return answers([sys.executable, "-m", "pip", "--python", sys.executable, "--version"])


def no_venv_message(version: "tuple[int, ...]") -> str:
    """What to do where no virtual environment can be made."""
    return (
        f"setup_env.py: {sys.executable} cannot make virtual environments: its venv module lacks ensurepip, and "
        "there is no virtualenv, uv or pip >= 22.3 to help out; on Debian and Ubuntu: "
        f"sudo apt install python{version[0]}.{version[1]}-venv; then run this again"
    )


def create(venv: Path, folder: Path) -> None:
    """Make the virtual environment; a broken one is made anew, any other folder is left alone."""
    if venv.is_symlink() or venv.exists():
        if venv.is_symlink() or not (venv / "pyvenv.cfg").is_file():
            raise SetupError(f"setup_env.py: {venv} is not a virtual environment; move it away and run this again")
        print(f"{venv} does not start or is too old: making it anew", flush=True)
        shutil.rmtree(venv)
    for command in ways_to_create(venv):
        if run(command, folder) == 0 and usable(venv):
            return
        shutil.rmtree(venv, ignore_errors=True)
    raise SetupError(no_venv_message(sys.version_info[:2]))


def installer(venv: Path) -> "list[str]":
    """The start of an install command that puts packages into the virtual environment."""
    python = str(tool(venv, "python"))
    if answers([python, "-m", "pip", "--version"]):
        return [python, "-m", "pip", "install"]
    if host_pip():
        return [sys.executable, "-m", "pip", "--python", python, "install"]
    uv = shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", python]
    if answers([python, "-m", "ensurepip"]):
        return [python, "-m", "pip", "install"]
    raise SetupError(f"setup_env.py: no pip for {venv}; delete that folder and run this again")


def wanted(folder: Path, extra: str) -> "dict[str, str]":
    """What an up-to-date installation looks like: project file, place, extra."""
    digest = hashlib.sha256((folder / "pyproject.toml").read_bytes()).hexdigest()
    return {"pyproject": digest, "folder": str(folder), "extra": extra}


def installed(stamp: Path, want: "dict[str, str]") -> bool:
    """Whether the stamp of the last complete installation covers what is wanted (an extra covers none)."""
    try:
        have = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(have, dict):
        return False
    same = all(have.get(key) == want[key] for key in ("pyproject", "folder"))
    return same and want["extra"] in ("", have.get("extra"))


def install(folder: Path, venv: Path, extra: str) -> int:
    """Install vfmseg from its folder unless that is done; return the installer's exit code."""
    stamp, want = venv / STAMP, wanted(folder, extra)
    if installed(stamp, want):
        print(f"{venv} is up to date", flush=True)
        return 0
    if stamp.exists():
        stamp.unlink()  # an interrupted installation must not look complete
    what = f"{folder}[{extra}]" if extra else str(folder)
    code = run([*installer(venv), "--editable", what], folder)
    if code == 0:
        stamp.write_text(json.dumps(want), encoding="utf-8")
    return code


def workers(arguments: "list[str]") -> "list[str]":
    """Test processes: one a core, at most four (each holds torch), unless the caller has chosen."""
    if any(a.startswith(("-n", "--numprocesses", "--pdb")) or a == "no:xdist" for a in arguments):
        return []
    return ["-n", str(min(4, os.cpu_count() or 1))]


def steps(verb: str, venv: Path, arguments: "list[str]") -> "list[tuple[str, list[str]]]":
    """Name and command of each step of a verb, in order; the caller's arguments go to the last one."""
    if verb == "demo":
        return [("vfmseg demo", [str(tool(venv, "vfmseg")), "demo", *arguments])]
    python = str(tool(venv, "python"))
    return [
        ("ruff", [python, "-m", "ruff", "check", "."]),
        ("lint-imports", [str(tool(venv, "lint-imports")), "--no-logo"]),
        ("mypy", [python, "-m", "mypy"]),
        ("pytest", [python, "-m", "pytest", *workers(arguments), *arguments]),
    ]


def run_steps(plan: "list[tuple[str, list[str]]]", folder: Path) -> int:
    """Run the steps until one fails and say how long each took; return the exit code of the last one run."""
    for number, (name, command) in enumerate(plan, start=1):
        print(f"\n[{number}/{len(plan)}] {name}", flush=True)
        start = time.monotonic()
        code = run(command, folder)
        end = "done" if code == 0 else f"FAILED with exit code {code}"
        print(f"[{number}/{len(plan)}] {name}: {end} after {time.monotonic() - start:.0f} s", flush=True)
        if code:
            return code
    return 0


def main(arguments: "list[str]") -> int:
    """Set up, run the verb, return the exit code."""
    if too_old(sys.version_info[:3]):
        print(too_old(sys.version_info[:3], newer_python()), file=sys.stderr)
        return MACHINE
    if not arguments or arguments[0] not in EXTRAS:
        print(__doc__, file=sys.stdout if arguments[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    verb, *rest = arguments
    folder = Path(__file__).resolve().parent
    venv = folder / ".venv"
    try:
        if not usable(venv):
            create(venv, folder)
        code = install(folder, venv, EXTRAS[verb])
    except SetupError as error:
        print(error, file=sys.stderr)
        return MACHINE
    if code:
        print(
            "setup_env.py: the installation did not end well, the lines above say why; a second run uses what was "
            "downloaded",
            file=sys.stderr,
        )
        return MACHINE
    return run_steps(steps(verb, venv, rest), folder)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

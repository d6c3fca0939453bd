"""Serves parts of the files of a folder on this machine, and counts the bytes: a process of its own.

GDAL may ask for a file while rasterio keeps Python's lock, so a thread beside it would never answer.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Ranges(SimpleHTTPRequestHandler):
    """Answers with the bytes asked for; /served tells how many bytes of files it has sent."""

    served = 0
    asked = 0
    refused = 0  # number of the request that is answered by 503: the server is busy

    def do_GET(self) -> None:
        Ranges.asked += 1
        if Ranges.asked == Ranges.refused:
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if self.path == "/served":
            content = str(Ranges.served).encode()
        elif path.is_file():
            content = path.read_bytes()
        else:
            self.send_error(404)
            return
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2] or len(content))) if wanted else (0, len(content))
        part = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        Ranges.served += len(part)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    Ranges.refused = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=sys.argv[1])) as server:
        print(server.server_port, flush=True)
        server.serve_forever()

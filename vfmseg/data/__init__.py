"""From files to training samples: pairing, windows, augmentation and statistics."""

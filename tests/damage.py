"""What disks do to files."""

from pathlib import Path


def flip(file: Path, at: int = -3) -> None:
    """Another bit in the byte there."""
    whole = bytearray(file.read_bytes())
    whole[at] ^= 0x10
    file.write_bytes(whole)


def cut(file: Path) -> None:
    """Without its last bytes."""
    file.write_bytes(file.read_bytes()[:-5])

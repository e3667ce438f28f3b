"""Where the runs of an experiment are made: how many side by side, on which devices, here or on a Ray cluster."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge

from deepdelta.config import Settings
from deepdelta.device import usable_cores, visible_devices
from deepdelta.errors import UserError

On = Literal["here", "ray"]


@dataclass(frozen=True, kw_only=True)
class Places(Settings):
    """What a pool has to give to runs; each gets the threads that its settings ask for."""

    workers: Annotated[int, Ge(1)] | None = None
    """Runs side by side; None: one for each device, or as many as the cores have room for."""
    devices: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; each is one run's alone as long as that is at work. None named: all CUDA
    devices for runs that use such a one."""
    on: On = "here"
    """here: processes of this machine; ray: tasks of a Ray cluster whose nodes share the study's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.devices)) != len(self.devices):
            raise UserError(f"devices must be different ones, got {', '.join(self.devices)}.")
        if self.on == "ray" and self.devices:
            raise UserError("on a Ray cluster Ray gives runs their devices; leave devices out.")

    def settled(self, kind: str, threads: int) -> "Places":
        """With every number filled in, for runs on a kind of device with so many threads each."""
        devices = self.devices or (visible_devices(kind) if self.on == "here" else ())
        return replace(self, devices=devices, workers=self.workers or len(devices) or max(1, usable_cores() // threads))


LOCAL = Places()

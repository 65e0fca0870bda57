"""Runs a module under accelerate's FSDP on CPUs: `accelerate launch fsdp_on_cpu.py module ...`.

FSDP2 runs on CPUs, but accelerate turns its plugin on for GPUs only. All that is done here is to turn it on.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


_initialise = AcceleratorState.__init__


def _initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        # Every later look at the state starts from the partial one.
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _initialise_with_fsdp
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

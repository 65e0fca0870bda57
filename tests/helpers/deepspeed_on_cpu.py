"""Runs a module under DeepSpeed on CPUs: `accelerate launch deepspeed_on_cpu.py module ...`.

On CPUs DeepSpeed compiles an extension for the traffic within a machine, which takes minutes. gloo does without.
"""

import runpy
import sys

import deepspeed


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

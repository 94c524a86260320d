"""The parts of ``gpu_suite``, one file each. They need torch, triton, numpy and safetensors, and nothing else."""

"""`python -m ssa_megatron VERB`, also under torchrun."""

from ssa_megatron.cli import main

if __name__ == "__main__":
    main()

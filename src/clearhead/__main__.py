"""`python -m clearhead`, and so `torchrun -m clearhead train ...`."""

from clearhead.cli.start import main

if __name__ == "__main__":
    main()

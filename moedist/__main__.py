"""`python -m moedist` and `torchrun -m moedist`."""

from moedist.cli import main

main()

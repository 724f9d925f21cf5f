"""`python -m knnfast`: the command, in the form that `torchrun -m knnfast` starts."""

from knnfast.cli import main

main(prog_name="knnfast")

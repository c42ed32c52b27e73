"""`python sheeprlhf.py <verb> ...`: the command line, from a checkout of the repository."""

from sheeprlhf.cli import run

if __name__ == "__main__":
    run()

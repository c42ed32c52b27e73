"""`python -m sheeprlhf <verb> ...` does what the console script does."""

from sheeprlhf.cli import run

if __name__ == "__main__":
    run()

"""SheepRLHF: fine-tune and align language models on Lightning Fabric, simply and provably."""

__version__ = "0.1.0"

"""Direct preference optimisation (arXiv 2305.18290) as a plain loop, on the embedded model and data."""

import torch

from sheeprlhf import collate, load_policy, load_tokenizer, losses, prepare_data

BETA, PAIRS = 0.1, 8


def response_sums(model, batch):
    """(S,) summed log-probabilities of the batch's responses."""
    sums_S = torch.zeros(len(batch.response_lengths))
    return sums_S.index_add(0, batch.response_index_N, model(batch).target_N)


def main(steps=10):
    """Train; return the loss of each step."""
    tokenizer = load_tokenizer("tiny")
    policy, reference = load_policy("tiny"), load_policy("tiny").requires_grad_(False)
    pairs = prepare_data("docstrings", tokenizer, kind="preference", num_samples=1000).splits["reward"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-5)
    history = []
    for step in range(steps):
        batch = collate(pairs.examples(range(step * PAIRS, (step + 1) * PAIRS)), policy)
        log_ratios_S = response_sums(policy, batch) - response_sums(reference, batch)
        chosen_P, rejected_P = batch.pairs_P2.unbind(1)
        loss = losses.dpo.sigmoid(log_ratios_S[chosen_P], log_ratios_S[rejected_P], BETA).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        print(f"step {step + 1}  loss {loss:.4f}")
    return history


if __name__ == "__main__":
    main()

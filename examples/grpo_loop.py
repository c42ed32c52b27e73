"""Group relative policy optimisation (arXiv 2402.03300) as a plain loop, on the embedded model and data."""

import torch

from sheeprlhf import collate, load_policy, load_tokenizer, losses, prepare_data, sample

PROMPTS, RESPONSES = 8, 4


def score(text):
    """Reward short summaries."""
    return -float(len(text.split()))


def main(steps=10):
    """Train; return the mean score of each step."""
    tokenizer, policy = load_tokenizer("tiny"), load_policy("tiny")
    prompts = prepare_data("docstrings", tokenizer, kind="prompts", num_samples=1000).splits["train"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4)
    history = []
    for step in range(steps):
        rows = prompts.examples(range(step * PROMPTS, (step + 1) * PROMPTS))
        samples = sample(policy, tokenizer, rows, num_responses=RESPONSES, max_new_tokens=24, seed=step)
        scores_PG = torch.tensor([[score(text) for text in texts] for texts in samples.texts])
        advantages_S = losses.advantage.group_advantages(scores_PG, scale=True).flatten()
        batch = collate(samples.examples, policy)
        tokens = (policy(batch).target_N, samples.logprobs_N, advantages_S[batch.response_index_N])
        loss = losses.ppo.policy_losses(*tokens, clip_low=0.2, clip_high=0.2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(scores_PG.mean().item())
        print(f"step {step + 1}  score {history[-1]:.2f}")
    return history


if __name__ == "__main__":
    main()

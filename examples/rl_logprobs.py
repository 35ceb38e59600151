"""Policy gradients on long completions without logits: `lt.token_logprobs` and `longtrain.objectives`, with any model and loop.

    python examples/rl_logprobs.py                # a tiny random Llama learns to prefer one token, seconds on a CPU
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import longtrain as lt
from longtrain.objectives import group_advantages, grpo_loss

PROMPT, COMPLETION, GROUP, STEPS, WANTED = 8, 120, 8, 8, 7


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    for model in (policy, reference):
        lt.apply(model, lt.Plan(chunk_tokens=32))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(STEPS):
        prompts = torch.randint(3, 32, (1, PROMPT)).expand(GROUP, PROMPT)
        ids = policy.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=COMPLETION, do_sample=True, eos_token_id=None
        )
        mask = (torch.arange(ids.shape[1]) >= PROMPT).expand(ids.shape)
        reward = (ids[:, PROMPT:] == WANTED).float().mean(1)
        with torch.no_grad():
            old, _ = lt.token_logprobs(policy, ids)
            ref, _ = lt.token_logprobs(reference, ids)
        for _ in range(2):
            logp, entropy = lt.token_logprobs(policy, ids)
            loss = grpo_loss(logp, old, group_advantages(reward, GROUP), mask, ref_logp_BT=ref, kl_coef=0.01)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"step {step}: reward {float(reward.mean()):.3f}, entropy {float(entropy.detach()[mask].mean()):.3f}")


if __name__ == "__main__":
    main()

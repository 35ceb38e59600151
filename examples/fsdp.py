"""FSDP2 around a streamed transformers model: bfloat16 weights gathered layer by layer, gradients summed in float32.

    torchrun --nproc-per-node 2 examples/fsdp.py          # gloo on CPUs, nccl on GPUs; a tiny random Qwen3
    torchrun --nproc-per-node 2 examples/fsdp.py ddp      # the same with DDP

Each layer is one unit: one gather a pass and one reduce-scatter, whatever the number of chunks. (A segment of several layers can be one
unit
where FSDP2 casts nothing: its casts give the layers of a unit different arguments, which is refused.) FSDP2 and DDP average over the
processes, so that the loss is divided by the targets of all of them over their number.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3Config

import longtrain as lt

TOKENS, STEPS = 2048, 5


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = AutoModelForCausalLM.from_config(config).to(device)
    report = lt.apply(model, lt.Plan(chunk_tokens=TOKENS // 8))
    if sys.argv[1:] == ["ddp"]:
        module = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        module = fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    if rank == 0:
        print(report)
    torch.manual_seed(rank)
    targets = world * (TOKENS - 1)
    for step in range(STEPS):
        ids = (torch.arange(TOKENS, device=device)[None] + int(torch.randint(512, ()))) % 512
        loss = module(input_ids=ids, labels=ids, num_items_in_batch=targets / world).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: 'loss': {float(total):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

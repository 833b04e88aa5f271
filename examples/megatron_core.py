"""Upcycle in a plain Megatron-Core script: every rank fills its own experts from a dense Hugging Face folder.

    python examples/megatron_core.py /models/SmolLM2-135M
    torchrun --nproc-per-node 2 examples/megatron_core.py /models/SmolLM2-135M --expert-parallel 2

The script builds a `GPTModel`, fills it with one call, and prints the bytes that each rank read and the loss of one
batch. The loss equals the dense model's loss. Without a GPU, Megatron computes on the processor, because
`use_cpu_backend` replaces CUDA.
"""

import argparse
import os

# Import nemo_upcycle before Megatron: without it, Megatron's import fails on a machine with CUDA but no GPU.
from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into


# isort: split
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.models.megatron_config import megatron_fields, moe_fields
from nemo_upcycle.models.rotary import rope_frequencies


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dense", help="a Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3")
parser.add_argument("--expert-parallel", type=int, default=1, help="ranks that share the experts of a layer")
arguments = parser.parse_args()

on_gpu = not use_cpu_backend()
if on_gpu:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
store = None if "RANK" in os.environ else torch.distributed.HashStore()  # torchrun provides a store
torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=ranks)
parallel_state.initialize_model_parallel(expert_model_parallel_size=arguments.expert_parallel)
tensor_parallel.model_parallel_cuda_manual_seed(0)

spec = UpcycleSpec(num_experts=8, top_k=2)
with open_dense(arguments.dense) as dense:
    arch = dense.architecture
    config = TransformerConfig(
        **megatron_fields(arch),
        **moe_fields(spec, arch.ffn_size, arch.num_layers),
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=on_gpu,
        params_dtype=torch.bfloat16 if on_gpu else torch.float32,
        perform_initialization=False,  # every weight is overwritten below
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=arguments.expert_parallel,
    )
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=on_gpu, normalization=config.normalization)
    model = GPTModel(
        config,
        layers,
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_positions,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(arch.rope_theta),
    ).cuda()
    model.rotary_pos_emb.inv_freq = rope_frequencies(arch).cuda()  # Llama 3.1 and 3.2 scale the frequencies
    receipt = upcycle_into([model], dense, spec)
print(f"rank {rank}: {receipt.bytes_read:,} bytes read, {receipt.bytes_written:,} written, exact: {receipt.exact}")

# To train the model, wrap it here in Megatron's DistributedDataParallel, and create an optimizer.
tokens_BS = torch.randint(arch.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0)).cuda()
with torch.no_grad():
    loss_BS = model(tokens_BS[:, :-1], position_ids=None, attention_mask=None, labels=tokens_BS[:, 1:])
print(f"rank {rank}: loss {loss_BS.float().mean():.5f}")
torch.distributed.destroy_process_group()

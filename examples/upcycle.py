"""Turn a dense Llama or Qwen3 into a Mixture-of-Experts model: the whole method in one file.

    python examples/upcycle.py models/Llama-3.2-1B models/Llama-3.2-1B-E8T2 --experts 8 --top-k 2

PARENT is a Hugging Face folder. OUT becomes a Hugging Face folder with a Mixtral or a Qwen3-MoE, for transformers.
This file needs only torch and safetensors. Read it from top to bottom. `nemo-upcycle convert` writes the same bits.
The package can also upcycle inside a training job, and knows many more models and methods.

THE METHOD ("Llama 3 Meets MoE: Efficient Upcycling", arXiv 2412.09952)
1. The feed-forward network of every layer becomes E experts. Each expert starts as a copy of that network.
2. Every layer gets a router: a new matrix [E, D], filled with random numbers. A router gives one logit per expert.
   A token passes through the k experts with the largest logits. The experts' outputs are added up with combine
   weights.
3. Every other tensor is copied. Then training continues. The experts see different tokens and drift apart.

WHY THE NEW MODEL COMPUTES WHAT ITS PARENT COMPUTES
Write f(x) for the parent's network, and p_i for the combine weight of expert i. A layer of the new model computes

    y = sum of p_i expert_i(x) over the k chosen experts,    p = softmax(their k logits).

This softmax sees only the chosen logits, so the p_i sum to one, whatever numbers the router holds. Each expert is a
copy, so expert_i(x) = f(x), and

    y = (sum of p_i) f(x) = f(x).

Training thus starts at the parent's loss; only rounding differs. A softmax over all E logits, before the top k are
chosen, gives weights that sum to less than one. The new model then starts with a weaker network.

GRANULARITY: MORE AND SMALLER EXPERTS
The network is f(x) = down @ (silu(gate @ x) * (up @ x)). Neuron j owns row j of the matrices gate and up, and column j
of the matrix down. The output is a sum over neurons. So cutting the F neurons into G shards cuts the output into G
summands:

    f = f_0 + f_1 + ... + f_(G-1).

Expert c G + g is shard g of copy c; there are E / G copies. The experts of one copy share their row of the router, so
a token gives them equal logits. If k is a multiple of G, the top k are therefore k / G whole copies. All
shards of copy c have the same weight q_c. All k weights sum to one: G (sum of q_c) = 1. The layer computes

    y = sum of q_c (f_0 + ... + f_(G-1)) over the chosen copies = (sum of q_c) f = f / G.

So the matrix down is multiplied by G, which gives y = f again. Only this matrix is scaled. The network is linear in
the matrix down, so the factor on this matrix is also the factor on the output. A factor on the matrix gate does not
scale the output by the same factor, because silu(a x) is not a silu(x).
"""

import ctypes
import hashlib
import json
import math
import shutil
import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open


#: Dense class -> the new model's names of the block with the experts, and of the matrices gate, up and down.
NAMES = {
    "LlamaForCausalLM": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen3ForCausalLM": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
#: Settings that `config.json` may omit, and their default values.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
QWEN3_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
#: Settings that change the computation of a dense model in a way that this file does not implement.
REFUSED = ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FILE_BYTES = 5 * 10**9  # largest size of a file; a larger tensor gets a separate file
#: Files that are copied as they are. The parent's code, old weights and model card are not copied.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


class Mistake(Exception):
    """An error that the user can correct; its text says how."""


# ---- 1. Read the parent ---------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Mistake(f"{path} is damaged ({error}). Download it again.") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read `config.json`, check it, and add the settings that it leaves to the defaults of its class."""
    config = read_json(path)
    given = {key: value for key, value in config.items() if value is not None}
    classes = given.get("architectures")
    if classes not in [[name] for name in NAMES]:
        raise Mistake(f"{path}: architectures is {classes}; expected {' or '.join(NAMES)}. Use another parent.")
    for key in REFUSED:
        if given.get(key):
            raise Mistake(f"{path}: {key} is {given[key]}; expected none. Use another parent.")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if type(given.get(key)) is not int or given[key] < 1:
            raise Mistake(f"{path}: {key} is {given.get(key)!r}; expected a whole number, 1 or more. Correct it.")
    heads = given["num_attention_heads"]
    config |= DEFAULTS | {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads}
    return config | (QWEN3_DEFAULTS if classes == ["Qwen3ForCausalLM"] else {}) | given


def find_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a folder: one file, or the several files that an index names."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    found: dict[str, Path] = {}
    for path in sorted(folder / name for name in names):
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise Mistake(f"{path} is damaged ({error}). Download it again.") from None
    # Some old checkpoints store the rotary frequencies, which follow from config.json.
    return {name: path for name, path in found.items() if not name.endswith("rotary_emb.inv_freq")}


def read_tensor(parent: dict[str, Path], name: str) -> torch.Tensor:
    """Read one tensor. The file is opened anew each time, so that earlier tensors leave the memory."""
    with safe_open(parent[name], "pt") as file:
        return file.get_tensor(name)


def dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the parent, in the order in which a token meets them."""
    hidden, neurons, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    is_qwen3 = config["architectures"] == ["Qwen3ForCausalLM"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        **({"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)} if is_qwen3 else {}),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (neurons, hidden),
        "mlp.up_proj": (neurons, hidden),
        "mlp.down_proj": (hidden, neurons),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config["vocab_size"], hidden)}


def check_parent(config: dict[str, Any], parent: dict[str, Path]) -> None:
    """Check that the files hold the tensors that `config.json` describes, and no others."""
    expected, found = dense_shapes(config), {}
    for name, path in parent.items():
        with safe_open(path, "pt") as file:
            found[name] = tuple(file.get_slice(name).get_shape())
    if config["tie_word_embeddings"]:  # the output layer is the embedding; some files repeat this tensor
        if HEAD in found and not torch.equal(read_tensor(parent, HEAD), read_tensor(parent, EMBEDDING)):
            raise Mistake(f"{HEAD} is not {EMBEDDING}. Set tie_word_embeddings in config.json to false.")
        found.setdefault(HEAD, expected[HEAD])
    for name in expected | found:
        if (got := found.get(name)) != (wanted := expected.get(name)):
            raise Mistake(
                f"{name}: shape {got} in the files, {wanted} by config.json. Use files that belong together."
            )


# ---- 2. Plan every new tensor: everything that upcycling does to the weights ----------------------------------------
class New(NamedTuple):
    """A tensor of the new model, and how it is made."""

    name: str
    shape: tuple[int, ...]
    source: str  # name of the parent's tensor; empty for a router, which is random
    axis: int = 0  # axis of the neurons in the source: 0 for the rows of gate and up, 1 for the columns of down
    shards: int = 1  # number of shards into which the source is cut along this axis
    shard: int = 0  # index of the shard that this tensor takes
    factor: int = 1  # factor on the tensor's numbers


def plan(config: dict[str, Any], experts: int, granularity: int) -> list[New]:
    """List every tensor of the new model."""
    block, (gate, up, down) = NAMES[config["architectures"][0]]
    hidden, neurons = config["hidden_size"], config["intermediate_size"] // granularity
    tensors = []
    for name, shape in dense_shapes(config).items():
        layer, _, matrix = name.partition("mlp.")
        expert_name = f"{layer}{block}.experts.{{}}.{{}}.weight"
        if not matrix:  # outside the feed-forward networks
            is_tied = name == HEAD and config["tie_word_embeddings"]  # stored twice, because servers need it
            tensors.append(New(name, shape, source=EMBEDDING if is_tied else name))
        elif matrix == "gate_proj.weight":
            tensors.append(New(f"{layer}{block}.gate.weight", (experts, hidden), source=""))
            for expert in range(experts):
                shard = expert % granularity  # expert c G + g is shard g of copy c
                for part, source in ((gate, name), (up, f"{layer}mlp.up_proj.weight")):
                    new_name = expert_name.format(expert, part)
                    tensors.append(New(new_name, (neurons, hidden), source, 0, granularity, shard))
        elif matrix == "down_proj.weight":
            for expert in range(experts):
                shard, new_name = expert % granularity, expert_name.format(expert, down)
                tensors.append(New(new_name, (hidden, neurons), name, 1, granularity, shard, factor=granularity))
    return tensors


def random_router(layer: int, hidden: int, copies: int, granularity: int, seed: int) -> torch.Tensor:
    """Draw the router of a layer, [E, D] in float32: normal numbers with mean 0 and standard deviation 0.02.

    Each row has a separate generator, seeded with the row's name. So a row depends only on the seed, its layer and
    its copy. Every GPU of a training job can draw the rows that it holds, and the model does not depend on the layout.
    Uniform numbers become normal ones by Box-Muller in float64: `torch.randn` gives other bits on other processors.
    """
    uniform_C2D = torch.empty(copies, 2, hidden, dtype=torch.float64)
    for copy in range(copies):
        digest = hashlib.blake2b(f"{seed}/router/{layer}/{copy}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        torch.rand(2, hidden, generator=generator, out=uniform_C2D[copy])
    radius_CD = torch.sqrt(-2.0 * torch.log1p(-uniform_C2D[:, 0]))
    normal_CD = radius_CD * torch.cos(2.0 * math.pi * uniform_C2D[:, 1])
    # The G experts of a copy share its row, so that they are chosen together.
    return (normal_CD * 0.02).to(torch.float32).repeat_interleave(granularity, dim=0)


# ---- 3. Write the new model, one tensor at a time -------------------------------------------------------------------
def moe_config(config: dict[str, Any], dtype: torch.dtype, args: Namespace) -> dict[str, Any]:
    """Return the `config.json` of the new model: the parent's settings and the experts' settings."""
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters. Write both.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rotated = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if kind not in ROPES or rotated != 1:
        raise Mistake(f"Rotary embedding is {kind} on {rotated} of each head; expected {', '.join(ROPES)} on 1.")
    respelled = ("type", "rope_theta", "partial_rotary_factor", "dtype")
    scaling = {key: value for key, value in rope.items() if key not in respelled} | {"rope_type": kind}
    # The first three settings name files of code, which are not copied. The new class does not use the other settings.
    dropped = ("auto_map", "custom_pipelines", "custom_generate", "attention_bias", "mlp_bias", "layer_types")
    made = {key: value for key, value in config.items() if key not in respelled + dropped} | {
        "num_experts_per_tok": args.top_k,
        "tie_word_embeddings": False,
        "output_router_logits": False,  # set it to true to train with the balancing loss in transformers
        "router_aux_loss_coef": 0.01,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": theta},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    neurons = config["intermediate_size"] // args.granularity
    if config["architectures"] == ["LlamaForCausalLM"]:
        made |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        return made | {"num_local_experts": args.experts, "intermediate_size": neurons}
    made |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "use_sliding_window": False}
    made |= {"num_experts": args.experts, "moe_intermediate_size": neurons}
    # norm_topk_prob divides the chosen weights by their sum, which equals a softmax of the chosen logits.
    return made | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def split_into_files(tensors: list[New], itemsize: int) -> dict[str, list[New]]:
    """Distribute the tensors over files of at most `FILE_BYTES`, with the file names of transformers."""
    parts, used_bytes = [[]], 0
    for tensor in tensors:
        size_bytes = math.prod(tensor.shape) * itemsize
        if parts[-1] and used_bytes + size_bytes > FILE_BYTES:
            parts.append([])
            used_bytes = 0
        parts[-1].append(tensor)
        used_bytes += size_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def make(new: New, parent: dict[str, Path], dtype: torch.dtype, args: Namespace) -> torch.Tensor:
    """Return a tensor of the new model: a shard of its source, or a random router."""
    if new.source:
        shards = read_tensor(parent, new.source).chunk(new.shards, dim=new.axis)
        made = shards[new.shard].to(dtype) * new.factor
    else:
        layer, copies = int(new.name.split(".")[2]), args.experts // args.granularity
        made = random_router(layer, new.shape[1], copies, args.granularity, args.seed).to(dtype)
    if not math.isfinite(made.sum()) and not made.isfinite().all():  # the sum is fast, but it may overflow
        raise Mistake(f"{new.source} holds NaN, infinity or too large numbers. Use another checkpoint.")
    return made.contiguous()


def write_file(path: Path, tensors: list[New], parent: dict[str, Path], dtype: torch.dtype, args: Namespace) -> None:
    """Write a safetensors file from front to end: the length of its header, the header in JSON, the numbers.

    The copies of a tensor follow each other in the file, so that the tensor is made once and written E / G times.
    """
    groups: dict[tuple[str, str, int], list[New]] = {}
    for new in tensors:
        block = new.name.partition(".experts.")[0]
        groups.setdefault((block, new.source, new.shard), []).append(new)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for new in (new for copies in groups.values() for new in copies):
        start, end = end, end + math.prod(new.shape) * dtype.itemsize
        header[new.name] = {"dtype": DTYPES[dtype], "shape": new.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for copies in groups.values():
            made = make(copies[0], parent, dtype, args)
            numbers = (ctypes.c_char * made.nbytes).from_address(made.data_ptr())  # the tensor's bytes, without numpy
            for _ in copies:
                file.write(numbers)


def write_model(folder: Path, config: dict[str, Any], parent: dict[str, Path], args: Namespace) -> None:
    """Write weights, index, `config.json` and tokenizer. All weights get the type of the embedding."""
    dtype = read_tensor(parent, EMBEDDING).dtype
    if dtype not in DTYPES:
        raise Mistake(f"The weights are {dtype}; expected {' or '.join(DTYPES.values())}.")
    new_config = moe_config(config, dtype, args)
    tensors = plan(config, args.experts, args.granularity)
    parts = split_into_files(tensors, dtype.itemsize)
    for name, part in parts.items():
        print(f"{name}: {len(part)} tensors", flush=True)
        write_file(folder / name, part, parent, dtype, args)
    if len(parts) > 1:
        total_bytes = sum(math.prod(new.shape) for new in tensors) * dtype.itemsize
        weight_map = {new.name: name for name, part in parts.items() for new in part}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(new_config, indent=2))
    for name in (*TOKENIZER, *OTHERS, *LICENCES):
        if (args.parent / name).is_file():
            shutil.copyfile(args.parent / name, folder / name)


def check_options(args: Namespace) -> None:
    """Check the numbers and the folders of the command line."""
    experts, top_k, granularity = args.experts, args.top_k, args.granularity
    if not 2 <= experts <= 2048:
        raise Mistake(f"--experts is {experts}; expected 2 to 2048.")
    if granularity < 1 or experts % granularity:
        raise Mistake(f"--granularity is {granularity}; expected a divisor of --experts, which is {experts}.")
    if not 2 <= top_k <= experts:  # with one expert the combine weight is always 1, and the router never learns
        raise Mistake(f"--top-k is {top_k}; expected 2 to --experts, which is {experts}.")
    if top_k % granularity:
        raise Mistake(f"--top-k is {top_k}; expected a multiple of --granularity, which is {granularity}.")
    if args.seed < 0:
        raise Mistake(f"--seed is {args.seed}; expected 0 or more.")
    if not args.parent.is_dir():
        raise Mistake(f"No folder {args.parent}. PARENT is a Hugging Face folder on this machine.")
    if args.out.exists():
        raise Mistake(f"{args.out} exists. Choose another OUT, or delete it first.")


def upcycle(args: Namespace) -> None:
    """Check everything, write the new model into a hidden folder beside OUT, and rename this folder at the end."""
    check_options(args)
    config, parent = read_config(args.parent / "config.json"), find_tensors(args.parent)
    if (neurons := config["intermediate_size"]) % args.granularity:
        raise Mistake(f"--granularity is {args.granularity}; expected a divisor of intermediate_size, {neurons}.")
    check_parent(config, parent)
    out = args.out.resolve()
    unfinished = out.with_name(f".{out.name}.unfinished")
    if unfinished.exists():
        raise Mistake(f"{unfinished} exists: a killed run left it, or another run writes it. Delete it, or wait.")
    unfinished.mkdir(parents=True)
    try:
        write_model(unfinished, config, parent, args)
        unfinished.rename(out)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(unfinished)
        raise
    print(f"{out}: {args.experts} experts, top-{args.top_k}")
    if args.granularity > 1:
        print("Compute router logits in float32: in 16 bits two copies can have equal ones, and top-k mixes them.")


def main() -> None:
    """Read the command line, and report a user's mistake in one line."""
    parser = ArgumentParser(description="Turn a dense Llama or Qwen3 into a Mixture-of-Experts model.")
    parser.add_argument("parent", metavar="PARENT", type=Path, help="Hugging Face folder of a Llama or a Qwen3")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--experts", type=int, required=True, help="experts in every layer (E)")
    parser.add_argument("--top-k", type=int, required=True, help="experts that a token passes through (k)")
    parser.add_argument("--granularity", type=int, default=1, help="shards of each copy (G, default: 1)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the routers (default: 1234)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up if a batch system stops the job
    try:
        upcycle(args)
    except (Mistake, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "Stopped; OUT was not made.\n")


if __name__ == "__main__":
    main()

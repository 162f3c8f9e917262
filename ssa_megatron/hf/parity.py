"""The proof an export must pass: files against checkpoint bit for bit, exported layers against the trainer's in fp64.

Layer by layer, one in memory at a time: the exported class computes with what the written files hold, and the trainer's own
attention (`kernels`) with what the checkpoint holds, on one short sequence in both inference modes. In fp64, because there two
correct implementations select the same blocks. Any difference is a CheckpointError, and no folder is left.
"""

import copy
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from ssa_megatron.config.sections import RopeScaling
from ssa_megatron.errors import CheckpointError
from ssa_megatron.hf.configuration_ssa import SSAConfig
from ssa_megatron.hf.folder import HubFolder
from ssa_megatron.hf.modeling_ssa import SSADecoderLayer
from ssa_megatron.hf.modeling_ssa import rotary_table as exported_table
from ssa_megatron.model.rope import rotary_table as trainer_table

BLOCKS = 5  # of the sequence: four whole ones and a token of the next
RUNS = {"full": ("full", BLOCKS), "sparse": ("sparse", 2), "sparse, all blocks": ("sparse", BLOCKS)}
TOLERANCE = 1e-9  # of the largest hidden value
VOCABULARY_CHUNK = 16384


@torch.inference_mode()
def prove(checkpoint, path: Path, config: SSAConfig, dtype: torch.dtype | None) -> dict:
    """The report for parity.json. `config` is what was exported; `dtype` what the weights were converted to, None: nothing."""
    config = copy.deepcopy(config)
    config.topk = "exact"  # on so few blocks the authors' rule is the same
    files = _Files(checkpoint, HubFolder(path), dtype)
    tokens = torch.arange(4 * config.block_size + 1)[None] % config.vocab_size
    tables = _tables(config, tokens.shape[1])
    embedding, _ = files.pair("model.embed_tokens.weight")
    start = embedding[tokens].double()
    del embedding
    ours, trainers = ({name: start for name in RUNS} for _ in range(2))
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = SSADecoderLayer(config, i).eval()
        pairs = {name: files.pair(f"model.layers.{i}.{name}") for name, _ in layer.named_parameters()}
        layer.load_state_dict({name: got.double() for name, (_, got) in pairs.items()}, assign=True)
        weights = {name: wanted.double() for name, (wanted, _) in pairs.items()}
        del pairs
        position = torch.arange(tokens.shape[1])[None]
        for name, (mode, count) in RUNS.items():
            ours[name], _ = layer(ours[name], position, tables["exported"], None, None, mode, count, False)
            trainers[name] = _trainer_layer(weights, trainers[name], tables["trainer"], config, mode, count)
    norm, _ = files.pair("model.norm.weight")
    ours, trainers = ({k: _norm(x, norm.double(), config) for k, x in runs.items()} for runs in (ours, trainers))
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = _Logits(files.pair(head)[1], ours, trainers)
    report = {
        "tokens": tokens.shape[1],
        "logits_max_abs": logits.largest,
        "trainer_minus_export": logits.apart,
        "rotary_table_minus_trainers": tables["apart"],
        "full_minus_sparse_all_blocks": logits.between["sparse, all blocks"],
        "full_minus_sparse_2_blocks": logits.between["sparse"],
    }
    _judge(report)
    return {**files.report(), "forward": report}


def _judge(report: dict) -> None:
    if not torch.tensor(report["logits_max_abs"]).isfinite():
        raise CheckpointError("the exported model's logits are not finite", remedy="export an earlier step")
    limit = TOLERANCE * max(1.0, report["logits_max_abs"])
    for name, apart in report["trainer_minus_export"].items():
        if not apart <= limit:
            raise CheckpointError(
                f"logits of the exported class differ from the trainer's by {apart:.3g} in mode {name} (fp64)",
                remedy="modeling_ssa.py was changed, or the recipe is one this release computes differently",
            )
    if not report["rotary_table_minus_trainers"] <= 1e-5:
        raise CheckpointError("the exported rotary table is not the trainer's", remedy="modeling_ssa.py was changed")
    if not report["full_minus_sparse_all_blocks"] <= limit:
        raise CheckpointError(
            "sparse attention to every block is not full attention", remedy="modeling_ssa.py was changed"
        )


class _Files:
    """Tensors of checkpoint and folder side by side; every one is compared the first time it is asked for."""

    def __init__(self, checkpoint, folder: HubFolder, dtype: torch.dtype | None):
        self.checkpoint, self.folder, self.dtype = checkpoint, folder, dtype
        self._sha: dict[str, bytes] = {}
        self._parameters = 0

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(of the checkpoint, of the folder)."""
        wanted, got = self.checkpoint.tensor(name, kind="weight", dtype=self.dtype), self.folder.tensor(name)
        # as bytes: a NaN equals itself, and -0.0 differs from 0.0
        same = got.dtype == wanted.dtype and got.shape == wanted.shape
        if not same or not torch.equal(_bytes(got), _bytes(wanted.contiguous())):
            raise CheckpointError(f"{name} differs from the checkpoint after reloading", remedy="export again")
        if name not in self._sha:
            self._parameters += got.numel()
            self._sha[name] = hashlib.sha256(_bytes(got).numpy()).digest()
        return wanted, got

    def report(self) -> dict:
        missing = set(self.folder.shapes) ^ set(self._sha)
        if missing:
            raise CheckpointError(f"{min(missing)} is in the files or in the model, not in both", remedy="export again")
        digest = hashlib.sha256()
        for name in sorted(self._sha):
            digest.update(name.encode() + self._sha[name])
        return {
            "weights_bit_equal": True,
            "weights_sha256": digest.hexdigest(),
            "tensors": len(self._sha),
            "parameters": self._parameters,
        }


class _Logits:
    """What the output layer makes of the hidden states, a part of the vocabulary at a time: only the extremes are kept."""

    def __init__(self, head: Tensor, ours: dict[str, Tensor], trainers: dict[str, Tensor]):
        self.largest, self.apart = 0.0, dict.fromkeys(RUNS, 0.0)
        self.between = dict.fromkeys(RUNS, 0.0)
        for rows in head.split(VOCABULARY_CHUNK):
            wide = rows.double().T
            logits = {name: x @ wide for name, x in ours.items()}
            for name, own in logits.items():
                self.largest = _most(self.largest, own)
                self.apart[name] = _most(self.apart[name], own - trainers[name] @ wide)
                self.between[name] = _most(self.between[name], own - logits["full"])


def _most(so_far: float, x: Tensor) -> float:
    return torch.maximum(torch.tensor(so_far, dtype=x.dtype), x.abs().max()).item()  # a NaN stays


def _tables(config: SSAConfig, tokens: int) -> dict:
    """The trainer's rotary table in both layouts, so that fp64 layers are compared on equal angles, and how far ours is off."""
    rope = config.rope_parameters
    kept = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    scaling = RopeScaling(**kept) if rope["rope_type"] == "llama3" else None
    position = torch.arange(tokens)[None]
    trainers = [
        part.permute(1, 0, 2, 3) for part in trainer_table(position, config.head_dim, rope["rope_theta"], scaling)
    ]
    ours = exported_table(position, config, torch.float32)
    apart = max((a.transpose(1, 2) - b).abs().max().item() for a, b in zip(ours, trainers, strict=True))
    trainers = [part.double() for part in trainers]  # [1, N, 1, D]
    return {"trainer": trainers, "exported": [part.transpose(1, 2) for part in trainers], "apart": apart}


# ------------------------------------------------------------------------------------ the trainer's layer, one document
def _trainer_layer(w: dict[str, Tensor], x: Tensor, table, config: SSAConfig, mode: str, count: int) -> Tensor:
    """x [1, N, hidden]; the equations of model/attention.py, with the functions it calls."""
    batch, tokens, _ = x.shape
    y = _norm(x, w["input_layernorm.weight"], config)
    q, k, v = (
        (y @ w[f"self_attn.{name}_proj.weight"].T).view(batch, tokens, -1, config.head_dim) for name in ("q", "k", "v")
    )
    gate = torch.sigmoid(y @ w["self_attn.g_proj.weight"].T).view(batch, tokens, -1, config.gates)
    q, k = (_rotated(x, table) for x in (q, k))
    spec = kernels.BlockSpec(config.block_size, count)
    if config.attention_kind == "nsa":
        selected = gate[..., 1:2] * kernels.sparse_attention(q, k, v, spec)
        compressed = gate[..., :1] * kernels.compressed_attention(q, k, v, spec)
        output = compressed + selected + gate[..., 2:] * kernels.window_attention(q, k, v, config.window)
    elif mode == "full":
        output = gate * kernels.full_attention(q, k, v)
    else:
        output = gate * kernels.sparse_attention(q, k, v, spec)
    x = x + output.flatten(2) @ w["self_attn.o_proj.weight"].T
    y = _norm(x, w["post_attention_layernorm.weight"], config)
    gated = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return x + gated @ w["mlp.down_proj.weight"].T


def _norm(x: Tensor, weight: Tensor, config: SSAConfig) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _rotated(x: Tensor, table) -> Tensor:
    half = x.shape[-1] // 2
    return x * table[0] + torch.cat((-x[..., half:], x[..., :half]), -1) * table[1]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

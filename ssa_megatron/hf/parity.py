"""The proof an export must pass: files against checkpoint bit for bit, exported layers against the trainer's in fp64.

Layer by layer, one in memory at a time: the exported layer computes with what the written files hold, and the trainer's own
attention (`kernels`) with what the checkpoint holds, on the same input and in both inference modes. In fp64, where rounding
chooses no block; tokens whose choice is a tie are left out and counted. Any difference is a
CheckpointError, and no folder is left.
"""

import copy
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ssa_kernels
from ssa_megatron.config.sections import Attention, RopeScaling
from ssa_megatron.errors import CheckpointError
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSADecoderLayer
from ssa_megatron.hf.bundle.positions_ssa import rotary_table as exported_table
from ssa_megatron.hf.folder import HubFolder
from ssa_megatron.model.kinds.streams import STREAMS, AttentionInputs
from ssa_megatron.model.rope import rotary_table as trainer_table

BLOCKS = 5  # of the sequence: four whole ones and a token of the next
CHOSEN = 2  # blocks a token in sparse mode
TOLERANCE = 1e-9  # of the largest value of the layer's output
TIE = 1e-6  # of the score: `kernels` ranks scores as fp32 numbers
VOCABULARY_CHUNK = 16384


@torch.inference_mode()
def prove(checkpoint, path: Path, config: SSAConfig, dtype: torch.dtype | None) -> dict:
    """The report for parity.json. `config` is what was exported; `dtype` what the weights were converted to, None: nothing."""
    config = copy.deepcopy(config)
    config.topk = "exact"  # on so few blocks the reference rule is the same
    files = _Files(checkpoint, HubFolder(path), dtype)
    tokens = torch.arange(4 * config.block_size + 1)[None] % config.vocab_size
    position = torch.arange(tokens.shape[1])[None]
    tables = _tables(config, tokens.shape[1])
    embedding, _ = files.pair("model.embed_tokens.weight")
    x = dict.fromkeys(("full", "sparse"), embedding[tokens].double())
    del embedding
    apart, ties, all_blocks = {"full": 0.0, "sparse": 0.0}, 0, 0.0
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = SSADecoderLayer(config, i).eval()
        pairs = {name: files.pair(f"model.layers.{i}.{name}") for name, _ in layer.named_parameters()}
        layer.load_state_dict({name: got.double() for name, (_, got) in pairs.items()}, assign=True)
        weights = {name: wanted.double() for name, (wanted, _) in pairs.items()}
        del pairs

        def exported(mode, count, source, layer=layer):
            return layer(source, position, tables["exported"], None, None, mode, count, False)[0]

        for mode, count in (("full", BLOCKS), ("sparse", CHOSEN)):
            wanted, tied = _trainer_layer(weights, x[mode], tables["trainer"], config, mode, count)
            got = exported(mode, count, x[mode])
            if mode == "full":
                all_blocks = _worst(all_blocks, exported("sparse", BLOCKS, x[mode]) - got, got)
            apart[mode] = _worst(apart[mode], (got - wanted)[~tied], wanted)
            ties += int(tied.sum())
            x[mode] = wanted
    norm, _ = files.pair("model.norm.weight")
    x = {mode: _norm(hidden, norm.double(), config) for mode, hidden in x.items()}
    head = files.pair("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")[1]
    logits_max, modes_apart = 0.0, 0.0
    for rows in head.split(VOCABULARY_CHUNK):  # the logits of the whole vocabulary in fp64 are large, and not kept
        full, sparse = (x[mode] @ rows.double().T for mode in ("full", "sparse"))
        logits_max, modes_apart = _worst(logits_max, full), _worst(modes_apart, full - sparse)
    report = {
        "tokens": tokens.shape[1],
        "trainer_minus_export": apart,
        "ties_left_out": ties,
        "rotary_table_minus_trainers": tables["apart"],
        "full_minus_sparse_all_blocks": all_blocks,
        "logits_max_abs": logits_max,
        "logits_full_minus_sparse_2_blocks": modes_apart,
    }
    _judge(report)
    return {**files.report(), "forward": report}


def _judge(report: dict) -> None:
    if not math.isfinite(report["logits_max_abs"]):
        raise CheckpointError(
            "the exported model's logits are not finite", remedy="export an earlier step", id="logits-not-finite"
        )
    for mode, apart in report["trainer_minus_export"].items():
        if not apart <= TOLERANCE:
            raise CheckpointError(
                f"a layer of the exported class is {apart:.3g} of its size off the trainer's in {mode} mode (fp64)",
                remedy="modeling_ssa.py was changed, or the recipe is one this release computes differently",
                id="layer-differs",
            )
    if not report["rotary_table_minus_trainers"] <= 1e-5:
        raise CheckpointError(
            "the exported rotary table is not the trainer's",
            remedy="modeling_ssa.py was changed",
            id="rotary-table-differs",
        )
    if not report["full_minus_sparse_all_blocks"] <= TOLERANCE:
        raise CheckpointError(
            "sparse attention to every block is not full attention",
            remedy="modeling_ssa.py was changed",
            id="sparse-differs-from-full",
        )


def _worst(so_far: float, x: Tensor, size: Tensor | None = None) -> float:
    """The larger of `so_far` and max |x|, as a share of max |size| if there is one; a NaN stays."""
    if x.numel() == 0:
        return so_far
    share = x.abs().max() / (1.0 if size is None else size.abs().max().clamp(min=1e-30))
    return torch.maximum(torch.tensor(so_far, dtype=x.dtype), share).item()


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
            raise CheckpointError(
                f"{name} differs from the checkpoint after reloading",
                remedy="export again",
                id="reloaded-tensor-differs",
            )
        if name not in self._sha:
            self._parameters += got.numel()
            self._sha[name] = hashlib.sha256(_bytes(got).numpy()).digest()
        return wanted, got

    def report(self) -> dict:
        missing = set(self.folder.shapes) ^ set(self._sha)
        if missing:
            raise CheckpointError(
                f"{min(missing)} is in the files or in the model, not in both",
                remedy="export again",
                id="export-names-unmatched",
            )
        digest = hashlib.sha256()
        for name in sorted(self._sha):
            digest.update(name.encode() + self._sha[name])
        return {
            "weights_bit_equal": True,
            "weights_sha256": digest.hexdigest(),
            "tensors": len(self._sha),
            "parameters": self._parameters,
        }


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
def _trainer_layer(w: dict[str, Tensor], x: Tensor, table, config: SSAConfig, mode: str, count: int):
    """x [1, N, hidden] -> the same, and bool [1, N]: tokens whose choice of blocks is a tie.

    The equations of model/attention.py, with the streams that it calls.
    """
    batch, tokens, _ = x.shape
    y = _norm(x, w["input_layernorm.weight"], config)
    q, k, v = (
        (y @ w[f"self_attn.{name}_proj.weight"].T).view(batch, tokens, -1, config.head_dim) for name in ("q", "k", "v")
    )
    gate = torch.sigmoid(y @ w["self_attn.g_proj.weight"].T).view(batch, tokens, -1, config.gates)
    q, k = (_rotated(x, table) for x in (q, k))
    spec, tied = ssa_kernels.BlockSpec(config.block_size, count), _ties(q, k, config, count)
    inputs = AttentionInputs(q, k, v, gate, spec, where={}, blocks={})
    attention, names = Attention(window=config.window), config.computed_streams(mode)
    streams = [gate[..., i : i + 1] * STREAMS[name].forward(inputs, attention) for i, name in enumerate(names)]
    output = sum(streams[1:], streams[0])
    x = x + output.flatten(2) @ w["self_attn.o_proj.weight"].T
    y = _norm(x, w["post_attention_layernorm.weight"], config)
    gated = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
    return x + gated @ w["mlp.down_proj.weight"].T, tied if mode == "sparse" else torch.zeros_like(tied)


def _ties(q: Tensor, k: Tensor, config: SSAConfig, count: int) -> Tensor:
    """bool [1, N]: the last block chosen and the first not chosen of some group score the same (docs/method.md, step 4)."""
    tokens, groups = q.shape[1], k.shape[2]
    index, own = torch.arange(tokens // config.block_size), torch.arange(tokens)[:, None] // config.block_size
    pooled = k[:, : len(index) * config.block_size].unflatten(1, (len(index), -1)).mean(2)
    score = torch.einsum("bngid,bjgd->bngij", q.unflatten(2, (groups, -1)), pooled) * config.head_dim**-0.5
    complete = (index + 1) * config.block_size <= torch.arange(tokens)[:, None] + 1
    score = score.masked_fill(~complete[None, :, None, None], -torch.inf).softmax(-1).sum(3)  # [1, N, groups, M]
    ranked = score.masked_fill(~(index < own)[None, :, None], -torch.inf).sort(-1, descending=True).values
    if count > ranked.shape[-1]:
        return torch.zeros(1, tokens, dtype=torch.bool)
    last, next_one = ranked[..., count - 2], ranked[..., count - 1]
    return (last - next_one < TIE * last).any(-1)


def _norm(x: Tensor, weight: Tensor, config: SSAConfig) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _rotated(x: Tensor, table) -> Tensor:
    half = x.shape[-1] // 2
    return x * table[0] + torch.cat((-x[..., half:], x[..., :half]), -1) * table[1]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

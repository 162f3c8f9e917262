"""What an exported folder does once loaded, generate text and score documents, with torch and transformers alone.

`isolated.py` runs this file by its path in a process that can import nothing else, and `generate.py` and
`evaluation/perplexity.py` call the same functions in-process, so there is one implementation. A folder with missing or
unexpected weights is a ValueError: transformers alone would fill them with random numbers and go on.
"""

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

LOGIT_ROWS = 2048
"""Tokens whose fp32 logits exist at once: those of a long document would be the largest tensor of the run."""


def load_model(folder, *, device="cpu"):
    """The model of an exported folder in the dtype it was saved in, in evaluation mode."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype="auto", output_loading_info=True
    )
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        said = ", ".join(f"{key.replace('_', ' ')}: {names[:3]}" for key, names in problems.items() if names)
        raise ValueError(f"{folder}: the weights do not fit the model ({said})")
    return model.to(device).eval()


def load_tokenizer(folder):
    # It has no code of its own. False, not nothing: transformers 5 would look at the model's code first, and ask on a terminal.
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@torch.inference_mode()
def generate_texts(
    model,
    tokenizer,
    prompts,
    *,
    mode=None,
    block_count=None,
    max_new_tokens=64,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    use_cache=True,
):
    """Continuations of `prompts` (one batch, padded on the left), without the prompts; temperature 0 is greedy."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # nothing that is None may be passed on: transformers validates what forward would be given
    attention = {"inference_mode": mode, "block_count": block_count}
    attention = {key: value for key, value in attention.items() if value is not None}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            **sampling,
            **attention,
        )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def token_nats(model, documents, *, mode=None, block_count=None, batch_tokens=4096):
    """Nats of each token of token-id lists after its document's first, which is context only: fp32 CPU tensors, in order.

    Documents of like length share a batch of at most `batch_tokens`; a longer document is a batch of its own.
    """
    found = [torch.empty(0)] * len(documents)
    order = sorted((i for i in range(len(documents)) if len(documents[i]) > 1), key=lambda i: len(documents[i]))
    while order:
        rows = max(1, min(len(order), batch_tokens // len(documents[order[-1]])))
        batch, order = order[-rows:], order[:-rows]
        length = len(documents[batch[-1]])
        tokens = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.zeros(rows, length, dtype=torch.long)
        for row, i in enumerate(batch):  # padded on the right: causal, so real tokens never see it
            tokens[row, : len(documents[i])] = torch.as_tensor(documents[i])
            mask[row, : len(documents[i])] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        hidden = model.model(
            tokens, attention_mask=mask, use_cache=False, inference_mode=mode, block_count=block_count
        ).last_hidden_state
        for row, i in enumerate(batch):
            end = len(documents[i]) - 1
            parts = [slice(t, min(t + LOGIT_ROWS, end)) for t in range(0, end, LOGIT_ROWS)]
            nats = [
                torch.nn.functional.cross_entropy(
                    model.lm_head(hidden[row, part]).float(), tokens[row, 1:][part], reduction="none"
                )
                for part in parts
            ]
            found[i] = torch.cat(nats).cpu()
    return found


def score_documents(model, documents, **options):
    """(sum of nats, tokens counted) of token-id lists; options as for `token_nats`."""
    found = token_nats(model, documents, **options)
    return sum(nats.double().sum().item() for nats in found), sum(map(len, found))


def perplexity_of(nats, counted):
    return {"nats_per_token": nats / counted, "perplexity": math.exp(nats / counted), "tokens": counted}


def run_job(job):
    """A JSON-able job to a JSON-able answer; see `isolated.run_isolated` for the keys."""
    model, tokenizer = load_model(job["folder"]), load_tokenizer(job["folder"])
    answer = {"torch": torch.__version__, "transformers": __version__, "generated": [], "perplexity": []}
    for request in job.get("generate", []):
        answer["generated"].append({**request, "texts": generate_texts(model, tokenizer, **request)})
    if "pipeline" in job:
        from transformers import pipeline  # here: it imports every pipeline there is

        maker = pipeline("text-generation", model=job["folder"], trust_remote_code=True)
        made = maker(job["pipeline"], max_new_tokens=8, do_sample=False, batch_size=2)
        answer["pipeline"] = [texts[0]["generated_text"] for texts in made]
    for request in job.get("perplexity", []):
        nats, counted = score_documents(model, job["documents"], **request)
        answer["perplexity"].append({**request, **perplexity_of(nats, counted)})
    return answer

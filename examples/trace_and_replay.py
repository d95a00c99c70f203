"""Record what a model's routers choose for a text, then ask how fast that would be elsewhere, under each policy.

    python examples/trace_and_replay.py                                # the model that ships in the package
    python examples/trace_and_replay.py allenai/OLMoE-1B-7B-0924

The GPUs of the table need not be here: a replay charges the recorded choices to a machine of numbers.
"""

import sys

import moestro
from moestro.planning.machines import machine_named
from moestro.planning.policies import make_policy
from moestro.simulate.replay import replay
from moestro.simulate.trace_summary import lru_hit_rate, recall
from moestro.text.tracing import trace_text

TEXT = "Once upon a time there was a king who had three daughters, and the youngest was so beautiful. " * 12


def main(model: str = "demo") -> None:
    """Print the routing in two figures and a line for each machine and policy."""
    loaded, tokenizer = moestro.load(model, device="cpu"), moestro.load_tokenizer(model)
    trace = trace_text(loaded, tokenizer, model, TEXT, tokens=64, prompt_tokens=32, decode_tokens=32)
    guessed = recall(trace, 1, trace.top_k) or 0.0
    print(f"an LRU of top-k slots hits {lru_hit_rate(trace, trace.top_k):.2f}, the next gate guesses {guessed:.2f}")
    half = trace.spec.dense_bytes + trace.spec.expert_bytes // 2  # so that half of the experts are on the GPU
    for name in ("rtx3060", "rtx4090"):
        for policy in ("cpu-only", "lru", "fiddler", "moestro"):
            machine = machine_named(name)
            found = replay(trace, make_policy(policy), machine, gpu_bytes=min(half, machine.gpu_bytes))
            print(f"{name:8} {policy:8} {found.decode.tok_s:9.1f} tok/s {found.decode.hit_rate:6.1%} hits")


if __name__ == "__main__":
    main(*sys.argv[1:2])

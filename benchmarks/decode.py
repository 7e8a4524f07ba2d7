"""Times decoding on the GPU: one step of 1 to 8 sequences, at short context and after 24K tokens.

The limit is the bytes of weights, states, and keys and values over the card's copy bandwidth;
`plot` computes it.

    python -m benchmarks.decode model.gguf
"""

from typing import Any

from benchmarks.gpu_model import GpuModel, arguments, write_results

CONTEXT = 32_768
CASES = ((1, 100), (2, 100), (4, 100), (8, 100), (1, 24_576), (8, 24_576))


def main() -> None:
    """See the module's docstring."""
    given = arguments("decode")
    model = GpuModel(given.model, CONTEXT, max_rows=512, kv=given.kv)
    rows: list[dict[str, Any]] = []
    print("sequences  position  tok/s  ms a step")
    for num_sequences, position in CASES:
        seconds = model.seconds(lambda n=num_sequences, p=position: model.decode(n, p), rounds=30)
        rows.append(
            {
                "sequences": num_sequences,
                "position": position,
                "kv": given.kv,
                "tokens_per_s": round(num_sequences / seconds, 1),
                "step_ms": round(seconds * 1e3, 3),
            }
        )
        print(
            f"{num_sequences:9}  {position:8}  {num_sequences / seconds:5.1f}  {seconds * 1e3:.3f}"
        )
    write_results("decode", model, given.model, rows)


if __name__ == "__main__":
    main()

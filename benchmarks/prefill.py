"""Times prompt evaluation on the GPU: chunks of 512 to 4,096 tokens, and 512 after 24K tokens.

The limit is the products' operations over the card's peak.

    python -m benchmarks.prefill model.gguf
"""

from typing import Any

from benchmarks.gpu_model import GpuModel, arguments, write_results

CONTEXT = 32_768
CASES = ((512, 0), (2_048, 0), (4_096, 0), (512, 24_576), (2_048, 24_576))


def main() -> None:
    """See the module's docstring."""
    given = arguments("prefill")
    model = GpuModel(given.model, CONTEXT, max_rows=4_096, kv=given.kv)
    rows: list[dict[str, Any]] = []
    print("tokens   after   tok/s       ms")
    for count, start in CASES:
        seconds = model.seconds(lambda n=count, p=start: model.prefill(n, p), rounds=5)
        rows.append(
            {
                "tokens": count,
                "after": start,
                "kv": given.kv,
                "tokens_per_s": round(count / seconds),
                "ms": round(seconds * 1e3, 2),
            }
        )
        print(f"{count:6}  {start:6}  {count / seconds:6.0f}  {seconds * 1e3:7.2f}")
    write_results("prefill", model, given.model, rows)


if __name__ == "__main__":
    main()

"""Many clients that stream replies at the same time.

    python tests/oracles/streams.py http://127.0.0.1:8000 --model demo --streams 64 --seconds 60

Each client asks for the next reply when one has ended. Prints what happened; exits with 1 if a
reply had an error.
"""

import argparse
import asyncio
import time
from collections import Counter

from openai import AsyncOpenAI


async def hold_streams(
    url: str, models: list[str], *, streams: int, seconds: float, max_tokens: int = 32
) -> Counter[str]:
    """Counts: "replies", "tokens" and "errors", with one key for each kind of error."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def one(number: int) -> None:
            # At least one reply each, so that all streams are open at the same time.
            while counts[f"of {number}"] == 0 or time.monotonic() < end:
                try:
                    stream = await client.chat.completions.create(
                        model=models[number % len(models)],
                        messages=[{"role": "user", "content": f"def f{number}(x):"}],
                        stream=True,
                        stream_options={"include_usage": True},
                        max_tokens=max_tokens,
                        seed=number,
                    )
                    reason, usage = None, None
                    async for chunk in stream:
                        usage = chunk.usage or usage
                        reason = chunk.choices[0].finish_reason if chunk.choices else reason
                    assert reason in ("stop", "length") and usage is not None, (reason, usage)
                    counts["tokens"] += usage.completion_tokens
                    counts["replies"] += 1
                except Exception as error:  # noqa: BLE001  counted, and shown by the caller
                    counts["errors"] += 1
                    counts[f"error: {type(error).__name__} {error!s:.120}"] += 1
                counts[f"of {number}"] += 1

        await asyncio.gather(*(one(number) for number in range(streams)))
    return Counter({k: v for k, v in counts.items() if not k.startswith("of ")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    begin = time.monotonic()
    counts = asyncio.run(
        hold_streams(given.url, given.model, streams=given.streams, seconds=given.seconds)
    )
    print(f"{time.monotonic() - begin:.1f} s: {dict(counts)}")
    raise SystemExit(bool(counts["errors"]))


if __name__ == "__main__":
    main()

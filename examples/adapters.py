"""Shows what an adapter changes: a LoRA, an edited fact, or a control vector with a slider of strengths.

    python examples/adapters.py demo adapters/poet "Call me" --strengths 0 0.5 1

Strength 0 is the model itself. A server takes the same as `"adapters": [{"name": "poet", "strength": 0.5}]`.
"""

from __future__ import annotations

import argparse

from gptj_dist import LLM, AdapterChoice, SamplingParams


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("adapter", help="a directory of a LoRA, a file of edits, or a .gguf of a control vector")
    parser.add_argument("prompt")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args(arguments)
    with LLM(options.model, adapters={"it": options.adapter}) as llm:
        params = [
            SamplingParams(options.max_tokens, temperature=0, adapters=(AdapterChoice("it", strength),))
            for strength in options.strengths
        ]
        # All strengths are computed in one batch.
        outputs = llm.generate([options.prompt] * len(params), params, use_tqdm=False)
    for strength, output in zip(options.strengths, outputs, strict=True):
        print(f"{strength:5.2f}  {options.prompt}{output.text!r}")


if __name__ == "__main__":
    main()

"""Grades mathematical answers with math-verify in a process of its own, one JSON object per line in and out.

math-verify's time limits are alarm signals, which only a main thread can have, and which do not interrupt a long
computation inside C (9**9**9**9). A process has a main thread of its own and can be killed; see
`fastrl.rewards.math_answers`. Run by path, not as a module: the package's imports would take seconds.
"""

import functools
import json
import os
import sys

PARSING_SECONDS, VERIFYING_SECONDS = 10, 5  # TRL's


def serve() -> None:
    """Answers {"gold", "answer"} with {"reward": 1, 0 or null, "gold", "answer"} until the input ends."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    parse_gold = functools.lru_cache(maxsize=256)(functools.partial(parse, parsing_timeout=PARSING_SECONDS))
    # A prediction must be LaTeX that was meant as the answer: \boxed first, no expression from anywhere in the text.
    extraction = [
        LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=True),
            boxed_match_priority=0,
            try_extract_without_anchor=False,
        )
    ]

    def grade(gold: str, answer: str) -> dict[str, object]:
        gold_parsed = parse_gold(gold)
        if not gold_parsed:
            return {"reward": None, "gold": "[unparseable]", "answer": "[skipped]"}
        parsed = parse(
            answer, extraction_config=extraction, extraction_mode="first_match", parsing_timeout=PARSING_SECONDS
        )
        reward = float(verify(gold_parsed, parsed, timeout_seconds=VERIFYING_SECONDS))
        return {"reward": reward, "gold": str(gold_parsed), "answer": str(parsed) if parsed else "[unparseable]"}

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(grade(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    serve()

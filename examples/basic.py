"""A reward and a call. Runs anywhere, without a network: ``python examples/basic.py`` (about 20 seconds on two cores).

With a GPU and a real model the call is ``rl.train(model="Qwen/Qwen3-4B", dataset="openai/gsm8k", rewards=[…])``.
"""

from quickstart_task import count_on, demonstrations

from posttrain import rl

TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@rl.reward(weight=1.0)
def correct(completion: str, answer: str) -> float:
    """1 for exactly the right digits; ``answer`` is a column of the dataset."""
    return float(completion == answer)


@rl.reward(weight=0.2)
def close(completion: str, answer: str) -> float:
    """Share of the digits that stand in the right place."""
    return sum(given == wanted for given, wanted in zip(completion, answer, strict=False)) / len(answer)


if __name__ == "__main__":
    result = rl.train(
        model={"random": {"config": TINY, "characters": "0123456789>"}},
        dataset=[{"prompt": f"{digit}>", "answer": count_on(digit)} for digit in range(10)],
        demonstrations=demonstrations(),
        warm_start={"steps": 150, "learning_rate": 5e-3},
        rewards=[correct, close],
        algorithm="gspo",
        steps=40,
        prompts_per_step=10,
        group_size=16,
        max_tokens=8,
        max_sequences=160,
        learning_rate=2e-3,
    )
    print(f"reward of the last step: {result.metrics[-1]['reward/correct/mean']:.2f}")
    print(f"adapter, as peft loads it: {result.checkpoint}")

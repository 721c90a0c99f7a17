"""The reward of the benchmark's answers, as a plugin."""

from llmrecipe.plugin import reward_function
from tests.benchmarks.workload import even_share


@reward_function
def even_words(text: str) -> float:
    """Share of the words whose number is even."""
    return even_share(text)

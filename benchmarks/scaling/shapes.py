"""The three models that the tables are about, as their published configurations have them."""

from dataclasses import dataclass

from transformers import LlamaConfig, MistralConfig

R1 = R2 = 16
SEQUENCE = 2048  # tokens of a row, one row in a forward pass


@dataclass(frozen=True)
class Model:
    """A decoder with a gated MLP.

    Attributes:
        name: As the tables call it.
        source: The public model of this shape.
        config: Its configuration.
    """

    name: str
    source: str
    config: LlamaConfig | MistralConfig

    def __post_init__(self) -> None:
        self.config.name_or_path = self.source  # PEFT holds it against the base that the adapter names

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return int(self.config.num_hidden_layers)

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of the seven linear layers of a block."""
        config = self.config
        head = config.head_dim or config.hidden_size // config.num_attention_heads
        query, key = config.num_attention_heads * head, (config.num_key_value_heads or config.num_attention_heads) * head
        hidden, inner = config.hidden_size, config.intermediate_size
        return (query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)

    @property
    def in_blocks(self) -> int:
        """Parameters of all linear layers."""
        return self.blocks * sum(m * n for m, n in self.linear)

    @property
    def outside(self) -> int:
        """Parameters of the embeddings and the head, which are not shared with one another."""
        return 2 * int(self.config.vocab_size) * int(self.config.hidden_size)

    @property
    def trained(self) -> int:
        """Parameters of the factors."""
        return self.blocks * sum((R1 + R2) * (m + n) for m, n in self.linear)


MODELS = (
    Model(
        "8B",
        "meta-llama/Llama-3.1-8B",
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        ),
    ),
    Model(
        "70B",
        "meta-llama/Llama-3.1-70B",
        LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        ),
    ),
    Model(
        "123B",
        "mistralai/Mistral-Large-Instruct-2407",
        MistralConfig(
            vocab_size=32768,
            hidden_size=12288,
            intermediate_size=28672,
            num_hidden_layers=88,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            sliding_window=None,
        ),
    ),
)

"""The size of baselines that tests make in a moment."""

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "window_size": 5,
    "chunk_size": 4,
    "mini_batch_size": 4,
    "state_size": 4,
    "initializer_range": 0.3,
}

"""Online upcycling: fill the Megatron chunks of a rank from a dense checkpoint."""

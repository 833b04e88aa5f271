"""Online upcycling in Megatron-Bridge: models, the start of a run, conversion of classes that Bridge lacks."""

"""Router health, FLOPs and throughput; knows no trainer."""

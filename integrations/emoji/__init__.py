"""A small, really trained text-to-image pipeline on emoji: two text encoders, joint attention, guidance, a decoder."""

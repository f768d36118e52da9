"""Numbers ↔ codes: the numpy reference (`affine`), bit packing (`packing`) and the torch fake-quantiser (`fake`)."""

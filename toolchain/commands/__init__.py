"""What the commands do, as functions of values: models to cost models to packages (`workflow`), training (`training`), measuring
quality (`scoring`), and the acceptance test on the device (`acceptance`, which needs no training stack); what each says (`answers`)."""

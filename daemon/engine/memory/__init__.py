"""Who has which place on the device: pages for keys and values, slots for recurrent states."""

"""An engine stepped on a virtual clock; trace readers and generators."""

"""What can be known about a training stage before any work. These modules import no torch: checks should be quick."""

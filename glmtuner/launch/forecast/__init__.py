"""What a run or a sweep will take, before it starts: time, hours, energy and money, from a probe of a few steps."""

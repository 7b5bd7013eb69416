"""From settings to processes: what was asked, what the machine is, a plan, and those who carry it out."""

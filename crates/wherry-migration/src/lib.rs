//! The journey of a running VM: phases, rounds, switchover, ownership, progress

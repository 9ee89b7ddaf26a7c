//! Guest RAM: blocks, page sets and dirty sources

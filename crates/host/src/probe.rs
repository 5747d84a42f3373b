//! Checks of the machine.

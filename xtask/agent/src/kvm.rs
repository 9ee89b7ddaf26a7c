//! Does KVM work in the outer machine? Asked of the kernel directly, so that a lab that cannot run guests is told
//! apart from a Wherry that cannot.

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where the program is put and started, in real mode.
const START: u64 = 0x1000;

/// Adds two registers and writes the sum to a port.
const PROGRAM: [u8; 7] = [
    0x00, 0xd8, // add al, bl
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xf4, // hlt
];

/// Makes a machine with an interrupt controller and a vCPU, and has it add 2 and 3.
pub fn probe() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
    memory.write_slice(&PROGRAM, GuestAddress(START))?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    attach(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    let mut registers = vcpu.get_regs().context("KVM_GET_REGS")?;
    registers.rip = START;
    registers.rax = 2;
    registers.rbx = 3;
    registers.rflags = 2;
    vcpu.set_regs(&registers).context("KVM_SET_REGS")?;
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(port, data) => {
            ensure!(port == 0x3f8 && data == [5], "the guest wrote {data:?} to port {port:#x}, expected 5 to 0x3f8");
            Ok(())
        }
        other => bail!("the guest stopped for {other:?}, expected a write to a port"),
    }
}

/// Gives the memory to the machine.
fn attach(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 0x10000,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
    };
    #[expect(unsafe_code, reason = "KVM is told an address, which only we can vouch for")]
    // SAFETY: the region is mapped for exactly this size by `memory`, which outlives the machine in `probe`.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
}

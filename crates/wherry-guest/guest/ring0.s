# Everything that runs outside ring 3. Kept to a few instructions: some hosts emulate ring 0, at about 1 us each.
#
#   pvh_start      32-bit PVH entry of the first vCPU (EBX: hvm_start_info)  -> ring 3, guest_first_cpu
#   ap_trampoline  real-mode entry of the others, copied to AP_TRAMPOLINE   -> ring 3, guest_next_cpu
#   vector_stubs   one 16-byte stub per vector; exceptions go to ring 3 (guest_fault), interrupts are counted
#   gate_entry     #UD at gate_call in ring 3: the few things that only ring 0 may do (see gate.rs)
#
# A vCPU's block (PERCPU_SIZE, aligned) starts with its ring 0 page; RSP0 is the end of that page, so the page is
# found by rounding RSP down. Offsets in it: see percpu.rs.

    .section .note.pvh, "a", @note
    .balign 4
    .long 4                     # name size
    .long 8                     # descriptor size
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .section .tables, "aw", @progbits
    .balign 4096
# Identity map of the first 4 GiB in 2 MiB pages, user-accessible, accessed and dirty set beforehand.
    .globl boot_pml4
boot_pml4:
    .quad boot_pdpt + 0x27
    .zero 4088
    .globl boot_pdpt
boot_pdpt:
    .quad boot_pd + 0x27
    .quad boot_pd + 0x1027
    .quad boot_pd + 0x2027
    .quad boot_pd + 0x3027
    .zero 4064
boot_pd:
    .set frame, 0
    .rept 2048
    .quad frame + 0xe7
    .set frame, frame + 0x200000
    .endr

    .balign 16
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 ring 0 code, 64-bit
    .quad 0x00cf93000000ffff    # 0x10 ring 0 data
    .quad 0x00cff3000000ffff    # 0x18 ring 3 data
    .quad 0x00affb000000ffff    # 0x20 ring 3 code, 64-bit
    .quad 0x00cf9b000000ffff    # 0x28 ring 0 code, 32-bit
    .quad 0x0000890000000067    # 0x30 TSS of vCPU 0, base filled in by pvh_start
    .quad 0
    .zero {MAX_CPUS} * 16 - 16  # TSSs of the others, filled in by smp.rs
gdt_end:

    .balign 4
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 4
idt_pointer:
    .word 0xfff
    .quad idt

    .globl start_info_gpa
    .balign 8
start_info_gpa:
    .quad 0
    .globl ap_index
ap_index:
    .quad 0

    .section .bss, "aw", @nobits
    .balign 4096
    .globl idt
idt:
    .zero 4096

    .section .ring0, "ax", @progbits
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    mov edi, offset __report_start
    mov ecx, 0x2000 / 4         # header and control page
    xor eax, eax
    rep stosd
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    rep stosd
    mov edi, offset __percpu
    mov ecx, 0x1000 / 4
    rep stosd
    mov [start_info_gpa], ebx
    # Firmware may have left the PIC with the PIT unmasked.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov eax, offset __percpu
    mov [gdt + 0x32], ax
    shr eax, 16
    mov [gdt + 0x34], al
    mov [gdt + 0x37], ah
    mov byte ptr [gdt + 0x35], 0x89 # not busy, should this be a second start
    xor esi, esi                # vCPU index
    mov edi, offset __percpu

# ESI: vCPU index, EDI: its block.
enter_long_mode:
    lgdt [gdt_pointer]
    mov eax, cr4
    or eax, 0x620               # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3         # not CD, NW, TS, EM
    or eax, 0x80010023          # PG, WP, NE, MP, PE
    mov cr0, eax
    .byte 0xea                  # far jump to 0x08:long_mode
    .long long_mode
    .word 0x08

    .code64
long_mode:
    mov ax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    lea rsp, [rdi + 0x1000]
    mov [rdi + 4], rsp          # TSS.RSP0
    mov word ptr [rdi + 0x66], 0x68
    mov [rdi + {CPU_INDEX}], rsi
    lidt [idt_pointer]
    mov eax, esi
    shl eax, 4
    add eax, 0x30
    ltr ax
    mov ax, 0x1b
    mov ds, eax
    mov es, eax
    lea rax, [rdi + {PERCPU_SIZE} - 8]
    mov ecx, offset guest_first_cpu
    test esi, esi
    jz 2f
    mov ecx, offset guest_next_cpu
2:
    mov edi, esi
    push 0x1b
    push rax
    push 0x3202                 # IOPL 3, IF
    push 0x23
    push rcx
    iretq

# Real mode, CS = AP_TRAMPOLINE / 16, at AP_TRAMPOLINE.
    .code16
    .globl ap_trampoline
ap_trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16 # lgdtd [ap_gdt_pointer - ap_trampoline]
    .word ap_gdt_pointer - ap_trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea            # far jump to 0x28:ap_protected
    .long ap_protected
    .word 0x28
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .globl ap_trampoline_end
ap_trampoline_end:

    .code32
ap_protected:
    mov ax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esi, [ap_index]
    mov edi, esi
    shl edi, {PERCPU_SHIFT}
    add edi, offset __percpu
    jmp enter_long_mode

    .code64
    .balign 16
    .globl vector_stubs
vector_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector >= 32
    push rax
    mov eax, vector
    jmp interrupt_common
    .else
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp fault_common
    .endif
    .set vector, vector + 1
    .endr

    .balign 16
interrupt_common:
    push rcx
    mov rcx, rsp
    and rcx, -4096
    inc dword ptr [rcx + rax * 4 + {IRQ_COUNTS}]
    inc dword ptr [rcx + {IRQ_COUNTS}]      # vector 0 is an exception: all of them
    cmp eax, {LEVEL_VECTORS}    # their drivers end them; and those that are spurious have no end
    jae 1f
    mov ecx, 0xfee000b0
    mov dword ptr [rcx], 0
1:
    pop rcx
    pop rax
    iretq

# Stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
fault_common:
    push rax
    push rcx
    mov rcx, rsp
    and rcx, -4096
    cmp qword ptr [rcx + {FAULT}], 0
    jne halt                    # a fault while reporting one
    mov rax, [rsp + 16]
    mov [rcx + {FAULT} + 8], rax
    mov rax, [rsp + 24]
    mov [rcx + {FAULT} + 16], rax
    mov rax, [rsp + 32]
    mov [rcx + {FAULT} + 24], rax
    mov rax, [rsp + 40]
    mov [rcx + {FAULT} + 32], rax
    mov rax, [rsp + 56]
    mov [rcx + {FAULT} + 40], rax
    mov rax, cr2
    mov [rcx + {FAULT} + 48], rax
    mov qword ptr [rcx + {FAULT}], 1
    mov rdi, [rcx + {CPU_INDEX}]
    lea rsp, [rcx + 0x1000]
    lea rax, [rcx + 0x2000 - 8]
    push 0x1b
    push rax
    push 0x3202
    push 0x23
    mov eax, offset guest_fault
    push rax
    iretq

# The way from ring 3 to ring 0: an invalid instruction at one known address. INT n from ring 3 is what one would use,
# but where ring 0 is emulated it is not; #UD arrives everywhere. Called by gate.rs.
    .globl gate_call
gate_call:
    ud2
    ret

# Handler of #UD. EAX: function, EDX: port or MSR, ECX: value. RDI, RSI: buffer. Only RAX, RCX, RDX, RDI, RSI change.
    .globl gate_entry
gate_entry:
    cmp qword ptr [rsp], offset gate_call
    jne 8f
    add qword ptr [rsp], 2
    cmp eax, 12
    ja 9f
    jmp [gate_table + rax * 8]
8:
    push 0
    push 6
    jmp fault_common
9:
    iretq
gate_outb:
    mov eax, ecx
    out dx, al
    iretq
gate_inb:
    xor eax, eax
    in al, dx
    iretq
gate_outl:
    mov eax, ecx
    out dx, eax
    iretq
gate_inl:
    in eax, dx
    iretq
gate_cpuid:                     # leaf EDX, subleaf ECX; EAX..EDX to [RDI]
    push rbx
    mov eax, edx
    cpuid
    mov [rdi], eax
    mov [rdi + 4], ebx
    mov [rdi + 8], ecx
    mov [rdi + 12], edx
    pop rbx
    iretq
gate_rdmsr:
    mov ecx, edx
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
gate_wrmsr:
    mov rax, rcx
    mov ecx, edx
    mov rdx, rax
    shr rdx, 32
    wrmsr
    iretq
gate_wait:                      # arm the LAPIC timer with ECX and sleep until any interrupt
    mov eax, 0xfee00380
    mov [rax], ecx
    sti
    hlt
    cli
    iretq
gate_rest:                      # the same, unless more than EDX interrupts have come
    mov rdi, rsp
    and rdi, -4096
    cmp [rdi + {IRQ_COUNTS}], edx
    je gate_wait
    iretq
gate_outs:                      # ECX bytes from [RSI] to port DX
    rep outsb
    iretq
gate_outw:
    mov eax, ecx
    out dx, ax
    iretq
gate_xsave:                     # CR4.OSXSAVE, and ECX into XCR0
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    mov eax, ecx
    xor ecx, ecx
    xor edx, edx
    xsetbv
    iretq
gate_halt:
halt:
    cli
    hlt
    jmp halt

    .section .rodata.gate, "a", @progbits
    .balign 8
gate_table:
    .quad gate_outb, gate_inb, gate_outl, gate_inl, gate_cpuid, gate_rdmsr, gate_wrmsr, gate_wait, gate_outs, gate_outw, gate_halt, gate_xsave, gate_rest

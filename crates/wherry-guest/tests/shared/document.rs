//! `docs/probe-guest.md` says what the code says.

use std::mem::offset_of;

use wherry_guest::data::{ENTRY_BYTES, page_tag};
use wherry_guest::params::Params;
use wherry_guest::report::{
    AccelReport, CONTROL_GPA, Control, CpuPage, DiskReport, EduReport, Fault, Header, MAX_CPUS, NetReport, PORT_GPA,
    PORT_ID, PORT_REG_EVENT, PORT_REG_ID, PORT_REG_POWEROFF, REPORT_GPA, TestdmaReport, VERSION, VerifyError,
    cpu_page_gpa,
};

const DOCUMENT: &str = include_str!("../../../../docs/probe-guest.md");

/// The lines between a heading and the next.
fn section(heading: &str) -> &'static str {
    let start = DOCUMENT.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no section {heading}"));
    let body = &DOCUMENT[start + heading.len() + 2..];
    &body[..body.find("\n#").unwrap_or(body.len())]
}

/// The rows of the table in a section, cut into cells, without the two lines of its head.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let lines = section(heading).lines().filter(|line| line.starts_with('|'));
    lines.skip(2).map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// Compares a table with (offset, name) of all fields, in order, and sizes with the distance to the next offset.
fn check(heading: &str, digits: usize, fields: &[(usize, &str)], size: usize) {
    let rows = rows(heading);
    let documented: Vec<_> = rows.iter().map(|row| (row[0].to_string(), row[1].to_string())).collect();
    let coded: Vec<_> =
        fields.iter().map(|(offset, name)| (format!("0x{offset:0digits$x}"), format!("`{name}`"))).collect();
    assert_eq!(documented, coded, "{heading}");
    let ends = fields.iter().skip(1).map(|field| field.0).chain([size]);
    for ((row, field), end) in rows.iter().zip(fields).zip(ends) {
        assert_eq!(row[2], (end - field.0).to_string(), "size of {} in {heading}", field.1);
    }
}

macro_rules! fields {
    ($structure:ty: $($field:ident),*) => {
        {
            // Fails to compile when a field is left out.
            #[allow(dead_code, reason = "only its completeness matters")]
            fn all(structure: &$structure) {
                type Structure = $structure;
                let Structure { $($field: _),* } = structure;
            }
            &[$((offset_of!($structure, $field), stringify!($field))),*]
        }
    };
}

#[test]
fn the_tables_list_every_field_with_offset_and_size() {
    check(
        "### Header",
        3,
        fields!(Header: magic, version, cpu_slots, cpus, cpus_online, failure, failure_cpu, tsc_khz, tsc_source,
            port_present, ram_bytes, data_pages, table_gpa, shadow_gpa, seed, extent_count, message_len, extents,
            message, disk, testdma, accel, edu, net),
        size_of::<Header>(),
    );
    check(
        "### Disk",
        2,
        fields!(DiskReport: present, depth, sectors, blocks, table_gpa, reads, writes, flushes, verified, errors,
            unexpected, interrupts, longest_ns, first_block, first_expected, first_found, in_flight, disk_pad),
        size_of::<DiskReport>(),
    );
    check(
        "### DMA",
        2,
        fields!(TestdmaReport: present, form, interrupt, vectors, entries, buffer, received, verified, rechecked, errors,
            spurious, interrupts, lost, longest_ns, toggles, area_gpa, pool_gpa, first_sequence, first_word,
            first_expected, first_found, masked, plugged),
        size_of::<TestdmaReport>(),
    );
    check(
        "### Accelerator",
        2,
        fields!(AccelReport: present, form, bell, engines, rings, depth, bytes, accel_pad, submitted, returned, jobs, verified,
            rechecked, errors, miscounted, lost, interrupts, rung, longest_ns, by_class, shared_gpa, places_gpa, first_ring, first_job,
            first_at, first_expected, first_found),
        size_of::<AccelReport>(),
    );
    check(
        "### Educational device",
        2,
        fields!(EduReport: present, interrupt, bytes, gone, asked, answered, dmas, verified, rechecked, errors, interrupts, spurious,
            lost, stalled, longest_ns, latency_ns, pool_gpa, first_sequence, first_at, first_expected, first_found),
        size_of::<EduReport>(),
    );
    check(
        "### Network",
        2,
        fields!(NetReport: present, window, sent, received, verified, foreign, errors, interrupts, longest_ns, first_number,
            first_word, first_expected, first_found),
        size_of::<NetReport>(),
    );
    check(
        "### Control",
        3,
        fields!(Control: sequence, rate, pattern, hot_permille, verify_permille, write, stop, reset_gaps, finish,
            reserved),
        size_of::<Control>(),
    );
    check(
        "### vCPU page",
        3,
        fields!(CpuPage: heartbeat, heartbeat_tsc, heartbeat_pad, phase, apic_id, slice_start, slice_pages,
            pages_filled, pages_dirtied, pages_verified, pages_prechecked, verify_passes, verify_errors,
            generation_sum, tsc_backwards, tsc_backwards_max, control_seen, reset_seen, errors_kept,
            timer_interrupts, register_checks, register_errors, gap_count, gap_max_ns, gap_max_tsc, gap_sum_ns, gaps, fault, errors,
            touch_count, touch_max_ns, touches),
        size_of::<CpuPage>(),
    );
    check("### Exception", 2, fields!(Fault: vector, taken, error_code, rip, cr2, rsp, cs), size_of::<Fault>());
    check(
        "### Finding",
        2,
        fields!(VerifyError: kind, cpu, gpa, page, expected, found, expected_generation, found_generation),
        size_of::<VerifyError>(),
    );
}

#[test]
fn addresses_and_constants_are_those_of_the_code() {
    assert!(DOCUMENT.starts_with(&format!("# The probe guest, version {VERSION}\n")));
    let memory = section("## Guest physical memory");
    for (gpa, what) in [(REPORT_GPA, "report header"), (CONTROL_GPA, "control page"), (PORT_GPA, "the probe port")] {
        assert!(memory.contains(&format!("| 0x{gpa:x} | {what} |")), "{what}");
    }
    let last = MAX_CPUS - 1;
    assert!(
        memory.contains(&format!("| 0x{:x} + 0x1000 * *i* | report page of vCPU *i*, 0 to {last} |", cpu_page_gpa(0)))
    );
    let port = rows("## The probe port");
    let registers: Vec<_> = port.iter().map(|row| row[0].to_string()).collect();
    assert_eq!(registers, [PORT_REG_ID, PORT_REG_EVENT, PORT_REG_POWEROFF].map(|offset| format!("0x{offset:02x}")));
    assert!(port[0][3].contains(&format!("0x{PORT_ID:08x}")));
    let pages = section("## What a page holds");
    assert!(
        pages.contains(&format!("0x{:x}", page_tag(0))) && pages.contains(&format!("{ENTRY_BYTES} bytes per page"))
    );
}

#[test]
fn every_parameter_is_documented_and_every_documented_one_exists() {
    let error = Params::parse("x=1").unwrap_err();
    let names = error.expected.strip_prefix("one of ").unwrap().split(", each").next().unwrap();
    let mut known: Vec<_> = names.split(", ").map(|name| format!("`{name}=`")).collect();
    let mut documented: Vec<_> = rows("## Parameters").iter().map(|row| row[0].to_string()).collect();
    known.sort();
    documented.sort();
    assert_eq!(documented, known);
    for row in rows("## Parameters") {
        for value in row[1].split(", ").filter(|value| value.starts_with('`') && *value != "`max`") {
            let word = format!("{}{}", row[0].trim_matches('`'), value.trim_matches('`'));
            assert!(Params::parse(&word).is_ok(), "{word}");
        }
    }
}

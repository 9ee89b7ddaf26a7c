//! The command line.

use proptest::prelude::*;
use wherry_guest::params::{
    AccelBell, AccelLoad, DiskWait, DmaInterrupt, DmaLoad, EduInterrupt, Idle, InjectedFault, Params, Pattern, Shadow,
    Write,
};
use wherry_guest::report::RATE_MAX;

#[test]
fn an_empty_line_gives_the_documented_defaults() {
    let params = Params::parse("  ").unwrap();
    assert_eq!(params, Params::default());
    assert_eq!((params.data, params.rate, params.hot_permille, params.verify_permille), (None, 50 << 20, 100, 200));
    assert_eq!((params.pattern, params.write, params.idle), (Pattern::Uniform, Write::Page, Idle::Spin));
}

#[test]
fn every_parameter_is_understood() {
    let line = "data=512M from=3G rate=max pattern=hot hot=12.5% verify=0% write=line precheck=off shadow=full seed=0x10 \
                cpus=2 idle=halt tsc_khz=2600000 run=1500 disk=1G disk_depth=64 disk_wait=poll testdma=wait \
                testdma_interrupt=intx testdma_vectors=16 testdma_entries=2 testdma_buffer=64K testdma_pool=1M \
                net=on testdma_mask=on testdma_plug=on testdma_eject=500 accel=wait accel_bell=poll accel_depth=256 accel_bytes=1M \
                accel_key=7 edu=intx edu_bytes=64 edu_raises=5 fault=gp";
    let expected = Params {
        data: Some(512 << 20),
        from: 3 << 30,
        rate: RATE_MAX,
        pattern: Pattern::Hot,
        hot_permille: 125,
        verify_permille: 0,
        write: Write::Line,
        precheck: false,
        shadow: Shadow::Full,
        seed: 16,
        cpus: 2,
        idle: Idle::Halt,
        tsc_khz: Some(2_600_000),
        run_ms: Some(1500),
        disk: Some(1 << 30),
        disk_depth: 64,
        disk_wait: DiskWait::Poll,
        testdma: Some(DmaLoad::Wait),
        testdma_interrupt: DmaInterrupt::Intx,
        testdma_vectors: 16,
        testdma_entries: 2,
        testdma_buffer: 64 << 10,
        testdma_pool: 1 << 20,
        testdma_mask: true,
        testdma_plug: true,
        testdma_eject: 500,
        net: true,
        accel: Some(AccelLoad::Wait),
        accel_bell: AccelBell::Poll,
        accel_depth: 256,
        accel_bytes: 1 << 20,
        accel_key: Some(7),
        edu: Some(EduInterrupt::Intx),
        edu_bytes: 64,
        edu_raises: 5,
        fault: Some(InjectedFault::Gp),
    };
    assert_eq!(Params::parse(line), Ok(expected));
}

#[test]
fn a_parameter_given_twice_counts_as_given_last() {
    assert_eq!(Params::parse("rate=1M rate=0").unwrap().rate, 0);
}

#[test]
fn words_that_are_not_parameters_are_named_with_what_would_be_right() {
    for (word, hint) in [
        ("quiet", "one of data"),
        ("colour=blue", "one of data"),
        ("data=", "number of bytes"),
        ("data=12X", "number of bytes"),
        ("data=-1", "number of bytes"),
        ("data=+1", "number of bytes"),
        ("data=99999999999999999999", "number of bytes"),
        ("data=16777216T", "number of bytes"),
        ("rate=fast", "or max"),
        ("hot=0%", "0.1%"),
        ("hot=10", "percentage"),
        ("verify=101%", "percentage"),
        ("verify=1.25%", "percentage"),
        ("cpus=0", "from 1 to 64"),
        ("cpus=65", "from 1 to 64"),
        ("pattern=random", "uniform, hot or sequential"),
        ("write=byte", "page or line"),
        ("idle=sleep", "spin or halt"),
        ("tsc_khz=0", "kHz"),
        ("precheck=yes", "on or off"),
        ("shadow=none", "table or full"),
        ("seed=0x+1", "number"),
        ("run=forever", "milliseconds"),
        ("disk=all", "number of bytes"),
        ("disk_depth=81", "from 1 to 80"),
        ("disk_depth=0", "from 1 to 80"),
        ("disk_wait=never", "interrupt or poll"),
        ("testdma=on", "ring or wait"),
        ("testdma_interrupt=pin", "msix, msi or intx"),
        ("testdma_vectors=65", "from 1 to 64"),
        ("testdma_entries=3", "power of two"),
        ("testdma_entries=2048", "power of two"),
        ("testdma_buffer=12", "multiple of 8"),
        ("testdma_buffer=128K", "16 to 64K"),
        ("testdma_mask=yes", "on or off"),
        ("testdma_plug=1", "on or off"),
        ("testdma_eject=1s", "milliseconds"),
        ("accel=on", "full or wait"),
        ("accel_bell=loud", "register, event or poll"),
        ("accel_depth=3", "power of two"),
        ("accel_depth=512", "up to 256"),
        ("accel_bytes=100", "multiple of 512"),
        ("accel_bytes=2M", "512 to 1M"),
        ("accel_key=x", "a handle"),
        ("fault=all", "page, gp, panic or registers"),
    ] {
        let line = format!("seed=1 {word} cpus=1");
        let error = Params::parse(&line).unwrap_err();
        assert_eq!(error.word, word);
        let text = error.to_string();
        assert!(text.contains(word) && text.contains(hint), "{text}");
    }
}

proptest! {
    #[test]
    fn no_line_makes_the_parser_panic(line in ".{0,200}") {
        let _ = Params::parse(&line);
    }

    #[test]
    fn sizes_are_what_they_say(n in 0u64..1 << 20, unit in 0usize..4) {
        let line = format!("data={n}{}", ["", "K", "M", "G"][unit]);
        prop_assert_eq!(Params::parse(&line).unwrap().data, Some(n << (10 * unit)));
    }
}

use prost::Message;

use crate::{grpc, types};

#[test]
fn test_encode_when_exec_process_then_golden_bytes() {
    let request = grpc::ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e".into(),
        process: Some(grpc::Process {
            terminal: true,
            user: Some(grpc::User { uid: 1, gid: 300, additional_gids: vec![5, 6], ..Default::default() }),
            args: vec!["sh".into()],
            ..Default::default()
        }),
        ..Default::default()
    };
    let golden = [
        0x0a, 2, b'c', b'1', // container_id
        0x12, 1, b'e', // exec_id
        0x22, 17, // process, number 4
        0x08, 1, // Terminal
        0x1a, 9, 0x08, 1, 0x10, 0xac, 2, 0x1a, 2, 5, 6, // User
        0x22, 2, b's', b'h', // Args
    ];
    assert_eq!(request.encode_to_vec(), golden);
    assert_eq!(grpc::ExecProcessRequest::decode(&golden[..]).expect("decodes"), request);
}

#[test]
fn test_encode_when_fs_group_then_number_one_is_unused() {
    let group =
        grpc::FsGroup { group_id: 7, group_change_policy: types::FsGroupChangePolicy::OnRootMismatch.into() };
    assert_eq!(group.encode_to_vec(), [0x10, 7, 0x18, 1]);
}

#[test]
fn test_encode_when_reseed_then_data_is_number_two() {
    assert_eq!(grpc::ReseedRandomDevRequest { data: vec![9] }.encode_to_vec(), [0x12, 1, 9]);
}

#[test]
fn test_encode_when_errnoret_is_zero_then_it_is_present() {
    let syscall = grpc::LinuxSyscall { errnoret: Some(0), ..Default::default() };
    assert_eq!(syscall.encode_to_vec(), [0x18, 0]);
    assert_eq!(grpc::LinuxSyscall::default().encode_to_vec(), [0_u8; 0]);
}

#[test]
fn test_encode_when_negative_status_then_ten_byte_varint() {
    let golden = [0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    assert_eq!(grpc::WaitProcessResponse { status: -1 }.encode_to_vec(), golden);
}

#[test]
fn test_decode_when_unknown_field_then_ignored() {
    let wire = [0x0a, 1, b'c', 0xfa, 0x3f, 1, 0]; // field 1023
    assert_eq!(grpc::StartContainerRequest::decode(&wire[..]).expect("decodes").container_id, "c");
}

#[test]
fn test_rpcs_when_counted_then_all_of_both_services() {
    let of = |service: &str| crate::RPCS.iter().filter(|(name, _)| *name == service).count();
    assert_eq!((of(crate::AGENT_SERVICE), of(crate::HEALTH_SERVICE)), (42, 2));
}

#[cfg(feature = "json")]
mod json {
    use super::*;
    use crate::json::ProtoError;
    use crate::{json_to_wire, wire_to_json};

    #[test]
    fn test_json_to_wire_when_each_rpc_then_known_and_empty_request_is_empty() {
        for (service, method) in crate::RPCS {
            assert_eq!(json_to_wire(service, method, b"{}").expect(method), b"", "{method}");
            assert_eq!(json_to_wire(service, method, b"").expect(method), b"", "{method}");
            assert!(wire_to_json(service, method, b"").expect(method).starts_with(b"{"), "{method}");
        }
    }

    #[test]
    fn test_json_to_wire_when_protocol_names_then_same_as_message() {
        let document = br#"{"container_id":"c","OCI":{"Version":"1","Process":{"Args":["a"],"OOMScoreAdj":-5,
            "User":{"UID":3,"AdditionalGids":[4]}},"Linux":{"Resources":{"CPU":{"Shares":2},"BlockIO":{"ThrottleReadIOPSDevice":[{"Rate":9}]}}},
            "Mounts":[{"destination":"/x","type":"tmpfs"}],"Annotations":{"k":"v"}},
            "storages":[{"driver":"blk","fs_group":{"group_id":1,"group_change_policy":"OnRootMismatch"}}]}"#;
        let wire = json_to_wire("grpc.AgentService", "CreateContainer", document).expect("fits");
        let request = grpc::CreateContainerRequest::decode(&wire[..]).expect("decodes");
        let spec = request.oci.expect("has a spec");
        let process = spec.process.expect("has a process");
        assert_eq!((process.oom_score_adj, process.user.expect("has a user").additional_gids), (-5, vec![4]));
        let resources = spec.linux.expect("linux").resources.expect("resources");
        assert_eq!(resources.cpu.expect("cpu").shares, 2);
        assert_eq!(resources.block_io.expect("block io").throttle_read_iops_device[0].rate, 9);
        assert_eq!(spec.mounts[0].r#type, "tmpfs");
        assert_eq!(request.storages[0].fs_group.as_ref().expect("group").group_change_policy, 1);
    }

    #[test]
    fn test_json_to_wire_when_bytes_then_base64() {
        let wire = json_to_wire("grpc.AgentService", "WriteStdin", br#"{"data":"aGkA"}"#).expect("fits");
        assert_eq!(wire, [0x1a, 3, b'h', b'i', 0]);
        let error =
            json_to_wire("grpc.AgentService", "WriteStdin", br#"{"data":"?"}"#).expect_err("is not base64");
        assert!(matches!(error, ProtoError::Document { line: 1, .. }), "{error}");
    }

    #[test]
    fn test_json_to_wire_when_unknown_field_then_refused() {
        let error =
            json_to_wire("grpc.AgentService", "StartContainer", br#"{"containerid":"c"}"#).expect_err("typo");
        assert!(matches!(error, ProtoError::Document { .. }), "{error}");
    }

    #[test]
    fn test_json_when_method_is_unknown_then_refused() {
        let refused = |result: Result<Vec<u8>, ProtoError>| {
            assert!(matches!(result, Err(ProtoError::UnknownRpc { .. })));
        };
        refused(json_to_wire("grpc.AgentService", "Nothing", b"{}"));
        refused(wire_to_json("grpc.Nothing", "Check", b""));
    }

    #[test]
    fn test_wire_to_json_when_answer_then_names_and_defaults() {
        let json = wire_to_json("grpc.Health", "Check", &[0x08, 1]).expect("decodes");
        assert_eq!(json, br#"{"status":"SERVING"}"#);
        let json = wire_to_json("grpc.Health", "Check", &[0x08, 9]).expect("decodes");
        assert_eq!(json, br#"{"status":9}"#);
        let json = wire_to_json("grpc.AgentService", "ReadStdout", &[0x0a, 2, b'o', b'k']).expect("decodes");
        assert_eq!(json, br#"{"data":"b2s="}"#);
        assert!(matches!(wire_to_json("grpc.Health", "Check", &[0x08]), Err(ProtoError::Wire { .. })));
    }

    #[test]
    fn test_json_when_interface_round_trips_then_equal() {
        let interface = types::Interface {
            name: "eth0".into(),
            ip_addresses: vec![types::IpAddress { family: 1, address: "::1".into(), mask: "64".into() }],
            hw_addr: "02:00:00:00:00:01".into(),
            device_path: "02/00".into(),
            raw_flags: 128,
            ..Default::default()
        };
        let text = serde_json::to_string(&interface).expect("serialises");
        assert!(text.contains(r#""IPAddresses":[{"family":"v6""#) && text.contains(r#""hwAddr""#), "{text}");
        assert_eq!(serde_json::from_str::<types::Interface>(&text).expect("parses"), interface);
    }
}

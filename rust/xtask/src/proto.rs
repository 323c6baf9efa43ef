//! Generation of the protocol's Rust code from its `.proto` files, and the check that the checked-in code is theirs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};

const FILES: [&str; 6] =
    ["agent.proto", "casemate.proto", "csi.proto", "health.proto", "oci.proto", "types.proto"];
const OUTPUTS: [&str; 4] = ["casemate.rs", "grpc.rs", "types.rs", "rpcs.rs"];
const NOTE: &str = "// Made by `cargo run -p xtask -- proto`; change the .proto files instead.\n";

/// Write the generated code into the source tree.
pub fn generate(root: &Path) -> Result<()> {
    generate_into(root, &root.join("rust/casemate-proto/src/generated"))
}

/// Fail when the generated code in the source tree is not what the `.proto` files give.
pub fn check(root: &Path) -> Result<()> {
    let fresh = tempfile::tempdir()?;
    generate_into(root, fresh.path())?;
    let checked_in = root.join("rust/casemate-proto/src/generated");
    for name in OUTPUTS {
        let wanted = fs::read(fresh.path().join(name))?;
        let found = fs::read(checked_in.join(name)).with_context(|| format!("{name} is missing"))?;
        if wanted != found {
            bail!("{name} differs from its .proto files: run `cargo run -p xtask -- proto`");
        }
    }
    Ok(())
}

fn generate_into(root: &Path, out: &Path) -> Result<()> {
    let directory = root.join("rust/casemate-proto/proto");
    let descriptors = protox::compile(FILES, [&directory]).context("compiling the .proto files")?;
    fs::create_dir_all(out)?;
    fs::write(out.join("rpcs.rs"), rpc_table(&descriptors)?)?;

    let mut config = prost_build::Config::new();
    config.out_dir(out).btree_map(["."]);
    config
        .type_attribute(".", "#[cfg_attr(feature = \"json\", derive(serde::Serialize, serde::Deserialize))]");
    for file in &descriptors.file {
        for message in &file.message_type {
            add_json_attributes(&mut config, &format!(".{}", file.package()), message);
        }
    }
    config.compile_fds(descriptors).context("generating")?;
    for name in OUTPUTS {
        let path = out.join(name);
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("{NOTE}{text}"))?;
    }
    Ok(())
}

/// Serde attributes that give JSON the protocol's own names, absent fields their defaults, and typing errors a refusal.
fn add_json_attributes(config: &mut prost_build::Config, scope: &str, message: &DescriptorProto) {
    let path = format!("{scope}.{}", message.name());
    config.message_attribute(&path, "#[cfg_attr(feature = \"json\", serde(default, deny_unknown_fields))]");
    for field in &message.field {
        let attribute = format!(
            "#[cfg_attr(feature = \"json\", serde(rename = \"{}\"{}))]",
            field.name(),
            codec_of(field)
        );
        config.field_attribute(format!("{path}.{}", field.name()), attribute);
    }
    // Entries of maps are nested messages that get no struct: attributes for them match nothing.
    for nested in &message.nested_type {
        add_json_attributes(config, &path, nested);
    }
}

fn codec_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Bytes => ", with = \"crate::json::base64_text\"".to_owned(),
        Type::Enum => {
            let path = rust_path(field.type_name());
            format!(
                ", serialize_with = \"crate::json::serialize_enum::<{path}, _>\", \
                 deserialize_with = \"crate::json::deserialize_enum::<{path}, _>\""
            )
        }
        _ => String::new(),
    }
}

/// `.grpc.VolumeUsage.Unit` → `crate::grpc::volume_usage::Unit`, as prost names things.
fn rust_path(type_name: &str) -> String {
    let parts: Vec<&str> = type_name.trim_start_matches('.').split('.').collect();
    let (last, scopes) = parts.split_last().expect("a type has a name");
    let mut path = "crate".to_owned();
    for scope in scopes {
        path.push_str("::");
        path.push_str(&snake_case(scope));
    }
    path.push_str("::");
    path.push_str(&camel_case(last));
    path
}

/// Boundaries as prost sees them: before a capital that follows a small letter, or that begins a word after capitals.
fn words(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words: Vec<String> = Vec::new();
    for (index, &letter) in letters.iter().enumerate() {
        let before = index.checked_sub(1).map(|i| letters[i]);
        let starts_word = letter.is_uppercase()
            && before.is_some_and(|b| {
                !b.is_uppercase() || letters.get(index + 1).is_some_and(|next| next.is_lowercase())
            });
        if letter == '_' {
            words.push(String::new());
        } else if starts_word || words.is_empty() {
            words.push(letter.to_string());
        } else if let Some(word) = words.last_mut() {
            word.push(letter);
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn snake_case(name: &str) -> String {
    words(name).iter().map(|word| word.to_lowercase()).collect::<Vec<_>>().join("_")
}

fn camel_case(name: &str) -> String {
    let capitalise = |word: &String| word[..1].to_uppercase() + &word[1..].to_lowercase();
    words(name).iter().map(capitalise).collect()
}

/// A macro that hands the list of all RPCs to another macro.
fn rpc_table(descriptors: &FileDescriptorSet) -> Result<String> {
    let mut table = String::new();
    table.push_str(
        "/// Call `$with!` with one `(service, method, request type, answer type)` for every RPC.\n",
    );
    table.push_str("#[macro_export]\nmacro_rules! for_each_rpc {\n    ($with:path) => {\n        $with! {\n");
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                writeln!(
                    table,
                    "            (\"{}.{}\", \"{}\", {}, {}),",
                    file.package(),
                    service.name(),
                    method.name(),
                    rust_path(method.input_type()).replacen("crate", "$crate", 1),
                    rust_path(method.output_type()).replacen("crate", "$crate", 1),
                )?;
            }
        }
    }
    table.push_str("        }\n    };\n}\n");
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_rust_path_when_name_has_acronyms_then_as_prost_names_it() {
        assert_eq!(rust_path(".types.IPFamily"), "crate::types::IpFamily");
        assert_eq!(rust_path(".types.FSGroupChangePolicy"), "crate::types::FsGroupChangePolicy");
        assert_eq!(rust_path(".grpc.VolumeUsage.Unit"), "crate::grpc::volume_usage::Unit");
        assert_eq!(rust_path(".grpc.OOMEvent"), "crate::grpc::OomEvent");
        assert_eq!(rust_path(".grpc.GetIPTablesRequest"), "crate::grpc::GetIpTablesRequest");
        assert_eq!(rust_path(".grpc.AddARPNeighborsRequest"), "crate::grpc::AddArpNeighborsRequest");
    }

    #[test]
    fn test_check_when_tree_is_as_committed_then_ok() {
        check(&crate::workspace_root()).expect("generated code is up to date");
    }
}

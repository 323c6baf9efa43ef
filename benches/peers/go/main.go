// Command peer is containerd's Go implementation of ttrpc: bench, check or serve, and the path of a unix socket.
//
// "bench" is driven by "casemate bench rpc"; "check" makes the calls of the interoperability tests and prints each outcome as a
// line of JSON; "serve" answers such calls.
package main

import (
	"log"
	"net"
	"os"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: peer bench|check|serve PATH")
	}
	path := os.Args[2]
	if os.Args[1] == "serve" {
		serve(path)
		return
	}
	connection, err := net.Dial("unix", path)
	if err != nil {
		log.Fatal(err)
	}
	switch os.Args[1] {
	case "bench":
		bench(connection)
	case "check":
		check(connection)
	default:
		log.Fatalf("no command %q", os.Args[1])
	}
}
